"""Run an artifact in its own runtime, in a child process: artifacts may come from anywhere.

`ArtifactRunner` is a `Runner` like any other. A crash of the runtime, or a call beyond its limits
of time and memory, is an InputError.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exporter import backends
from exporter.backends import Artifact, Runner, backend, check_runtime, parse_target
from exporter.child_process import ChildProcess, Limits
from exporter.errors import InputError

#: docs/formats.md has the limits.
#: Seconds to load any artifact, imports of the toolkit included, and for each MB of its files.
LOAD_SECONDS, LOAD_SECONDS_PER_MB = 60.0, 4.0
#: Seconds of any call, and for each MB and each 128 tokens. The slowest way to run an artifact, the
#: reference interpreter, takes a twentieth: 13 s for 128 tokens of an artifact of 80 MB.
CALL_SECONDS, CALL_SECONDS_PER_MB = 15.0, 4.0
#: Bytes that any runtime and its imports may allocate, also for each byte of the files, for each
#: token of the context and byte of the files, and for each thread.
BASE_MEMORY, MEMORY_PER_BYTE, MEMORY_PER_THREAD = 640 << 20, 16, 16 << 20
CACHE_PER_BYTE = 1 / 32
#: The largest context that counts, and the largest vocabulary; known ones have 262,144 tokens.
_CONTEXT, _VOCABULARY = 1 << 17, 1 << 22
_REMEDY = "Get the file again, or lower the model again"
_SERVICE = f"{__name__}:Service"


class ArtifactRunner:
    """An artifact in its own runtime on this machine, or in another way (`variant`), in a child.

    The child begins to load when the object is made; the first use waits for it. Raises
    MissingExtraError without the runtime, and InputError, then or later, for what fails.
    """

    def __init__(self, artifact: Artifact, variant: str = "") -> None:
        check_runtime(artifact.target.target)
        self._path = artifact.path
        paths = [artifact.path / name for name in artifact.files]
        size = sum(path.stat().st_size for path in paths if path.is_file())
        self._megabytes = size / 2**20
        context = min(artifact.target.max_context, _CONTEXT)
        self._memory = (
            BASE_MEMORY
            + size * MEMORY_PER_BYTE
            + math.ceil(size * context * CACHE_PER_BYTE)
            + torch.get_num_threads() * MEMORY_PER_THREAD
        )
        self._child = ChildProcess(_SERVICE, artifact.path, "the runtime", _REMEDY)
        self._sizes: tuple[int, int] | None = None
        seconds = LOAD_SECONDS + LOAD_SECONDS_PER_MB * self._megabytes
        arguments = {
            "path": str(artifact.path),
            "target": artifact.target.model_dump(mode="json"),
            "files": list(artifact.files),
            "variant": variant,
            "threads": torch.get_num_threads(),
            "formats": list(backends.__path__),
        }
        self._child.begin("load", Limits(seconds, self._memory), arguments)

    def wait(self) -> None:
        """Wait until the artifact is loaded. Raises InputError."""
        self._loaded()

    def stop(self) -> None:
        """End the child, from any thread. A call in progress raises InputError."""
        self._child.stop()

    @property
    def context(self) -> int:
        """The number of positions in the cache."""
        return self._loaded()[0]

    @property
    def vocab_size(self) -> int:
        """The number of tokens in the vocabulary."""
        return self._loaded()[1]

    def prefill(self, tokens: list[int]) -> Tensor:
        """Empty the cache and read these tokens: logits float32 [vocab_size]."""
        return self._logits("prefill", len(tokens), {"tokens": tokens})

    def decode(self, token: int) -> Tensor:
        """Read one more token: logits float32 [vocab_size]."""
        return self._logits("decode", 1, {"token": token})

    def _loaded(self) -> tuple[int, int]:
        """The sizes of the context and of the vocabulary, when it is loaded."""
        if self._sizes is None:
            context, vocab_size = self._child.finish()[0]
            for name, size, most in (
                ("context", context, math.inf),
                ("vocabulary", vocab_size, _VOCABULARY),
            ):
                if not (isinstance(size, int) and 1 <= size <= most):
                    raise InputError(self._path, f"has a {name} of {size} tokens", _REMEDY)
            self._sizes = context, vocab_size
        return self._sizes

    def _logits(self, method: str, tokens: int, arguments: Mapping[str, object]) -> Tensor:
        _, vocab_size = self._loaded()
        seconds = CALL_SECONDS + CALL_SECONDS_PER_MB * self._megabytes * (1 + tokens / 128)
        limits = Limits(seconds, self._memory, 4 * vocab_size)
        _, data = self._child.call(method, limits, arguments)
        if len(data) != 4 * vocab_size:
            found = len(data) // 4
            raise InputError(self._path, f"gives {found} logits, not {vocab_size}", _REMEDY)
        return torch.frombuffer(data, dtype=torch.float32)


class Service:
    """The child's side: loads one artifact and runs it."""

    _runner: Runner

    def load(
        self,
        _: bytes,
        path: str,
        target: dict[str, Any],
        files: list[str],
        variant: str,
        threads: int,
        formats: list[str],
    ) -> tuple[list[int], bytes]:
        """The context and the vocabulary of the artifact. `formats` is where backends are found."""
        backends.__path__[:] = formats
        torch.set_num_threads(threads)
        artifact = Artifact(Path(path), parse_target(target, path), tuple(files))
        self._runner = backend(artifact.target.target).load(artifact, variant)
        return [self._runner.context, self._runner.vocab_size], b""

    def prefill(self, _: bytes, tokens: list[int]) -> tuple[None, bytes]:
        """The logits after these tokens, with an empty cache before."""
        return None, _bytes(self._runner.prefill(tokens))

    def decode(self, _: bytes, token: int) -> tuple[None, bytes]:
        """The logits after one more token."""
        return None, _bytes(self._runner.decode(token))


def _bytes(logits: Tensor) -> bytes:
    return logits.float().contiguous().numpy().tobytes()
