"""A program of the user on a device, and the input files that are made for it."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from devices.engines import Model
from devices.files import cache_folder, replacing


@dataclass(frozen=True)
class Placed:
    """Paths on the device: of the `program`, of the `folder` with the `model`, and of the
    `workspace`."""

    program: str
    model: Model
    folder: str
    workspace: str

    @property
    def path(self) -> str:
        """The file or folder that the runtime opens."""
        return f"{self.folder}/{self.model.main}"

    def remote(self, local: Path) -> str:
        """The place of an input file on the device. It is outside `folder`, where ONNX Runtime
        takes every folder for a set of inputs."""
        return f"{self.workspace}/inputs/{local.name}"


def input_file(content: bytes, suffix: str) -> Path:
    """A file of this machine with this content, in the cache and named by its hash."""
    path = cache_folder() / "inputs" / f"{hashlib.sha256(content).hexdigest()[:32]}{suffix}"
    if not path.is_file():
        with replacing(path) as file:
            file.write(content)
    return path


def repeated(tokens: Sequence[int], count: int) -> list[int]:
    """`tokens`, repeated or cut off to `count`."""
    return [tokens[i % len(tokens)] for i in range(count)]
