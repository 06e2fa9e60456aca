"""The Core ML delegate inside a .pte: the whole decoder as one call of an embedded package.

    mobilellm lower build/nano-int4 --target executorch delegate=coreml activations=float16 ...

ExecuTorch's own partitioner would trace the model and let coremltools convert it, with scales of
its own. What the runtime wants is less: a package and a list of its inputs and outputs, as one
piece of data. So it gets the program of `coreml.graph`, with the quantized checkpoint's codes and
scales.

The runtime keeps a state for each method of a .pte (``ETCoreMLModel.mm``), so that a prompt read
by one method would be unknown to another. There is one, of one token a call, to which the
official runners feed a prompt token by token. A new text needs no new state: positions from its
own on are not looked at.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# First, since it keeps the import of coremltools quiet, which the compiler repeats.
from exporter.backends.coreml.toolkit import coremltools  # isort: skip
from executorch import exir
from executorch.backends.apple.coreml.compiler import CoreMLBackend
from executorch.exir.lowered_backend_module import LoweredBackendModule

from exporter.backends.coreml import Target
from exporter.backends.coreml.graph import LOGITS, MAIN, build_step
from exporter.backends.coreml.interpreter import Interpreter
from exporter.backends.coreml.lowering import check_room, write_package
from exporter.backends.coreml.package import Package, Value, open_package
from exporter.backends.executorch.file import delegate_payload
from exporter.errors import InputError
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint

#: The list at a payload's end, which names three files, is far shorter.
_LONGEST_LIST = 1 << 16
_FOLDER, _PACKAGE = "lowered_module", "model.mlpackage"
_FILE, _DIRECTORY = 0, 1


class _Call(nn.Module):
    """Tokens [1, 1] and a position [1] to the logits [1, 1, vocab_size], by the delegate."""

    def __init__(self, delegate: nn.Module) -> None:
        super().__init__()
        self.delegate = delegate

    def forward(self, tokens: Tensor, start: Tensor) -> Tensor:
        logits: Tensor = self.delegate(tokens, start)
        return logits


class _StandIn(nn.Module):
    """What the delegate's shapes and types are worked out from."""

    def __init__(self, vocab_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.vocab_size, self.dtype = vocab_size, dtype

    def forward(self, tokens: Tensor, start: Tensor) -> Tensor:
        return (tokens + start).unsqueeze(-1).to(self.dtype).expand(1, 1, self.vocab_size)


def export_step(quantized: QuantizedCheckpoint, target: Target) -> torch.export.ExportedProgram:
    """The program: one call of the delegate, which holds the package."""
    dtype = torch.float16 if target.activations == "float16" else torch.float32
    example = (torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    stand_in = torch.export.export(
        _StandIn(quantized.config.vocab_size, dtype), example, strict=False
    )
    delegate = LoweredBackendModule(
        exir.to_edge(stand_in).exported_program(),
        CoreMLBackend.__name__,
        _payload(quantized, target),
        CoreMLBackend.generate_compile_specs(
            minimum_deployment_target=coremltools.target.iOS18,
            compute_precision=coremltools.precision(target.activations),
        ),
    )
    return torch.export.export(_Call(delegate), example, strict=False)


def _payload(quantized: QuantizedCheckpoint, target: Target) -> bytes:
    """The package, and what the runtime wants to know of it, as one piece of data.

    The name under which a phone keeps the compiled model follows from the package's own bytes.
    """
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        specification = write_package(build_step(quantized, target), quantized, target, root)
        paths = sorted(path for path in root.rglob("*") if path.is_file())
        files = {f"{_PACKAGE}/{path.relative_to(root)}": path.read_bytes() for path in paths}
    digest = hashlib.sha256()
    for content in files.values():
        digest.update(content)
    described = specification.description
    metadata = {
        "inputNames": [given.name for given in described.input],
        "outputNames": [output.name for output in described.output],
        "identifier": f"executorch_{digest.hexdigest()}",
    }
    return flatten({"metadata.json": json.dumps(metadata).encode(), **files})


def flatten(files: Mapping[str, bytes]) -> bytes:
    """A folder as the runtime's ``inmemory_filesystem.cpp`` reads it: what is in the files, then
    a JSON list of files and folders, backwards, so that it is found from the end.

    The wheel can flatten a folder too, in whatever order the disk names its files.
    """
    nodes, content = list[dict[str, object]](), bytearray()

    def add(name: str, kind: int, children: Mapping[str, int], data: bytes) -> int:
        region = {"offset": len(content) if kind == _FILE else 0, "size": len(data)}
        nodes.append({"name": name, "kind": kind, "dataRegion": region, "children": children})
        content.extend(data)
        return len(nodes) - 1

    def add_folder(name: str, inside: Mapping[str, bytes]) -> int:
        children, folders = dict[str, int](), dict[str, dict[str, bytes]]()
        for path, data in inside.items():
            first, _, rest = path.partition("/")
            if rest:
                folders.setdefault(first, {})[rest] = data
            else:
                children[first] = add(first, _FILE, {}, data)
        for folder, deeper in folders.items():
            children[folder] = add_folder(folder, deeper)
        return add(name, _DIRECTORY, children, b"")

    add_folder(_FOLDER, files)
    return bytes(content) + json.dumps({"nodes": nodes}).encode()[::-1]


def unflatten(payload: memoryview) -> dict[str, memoryview]:
    """The inverse of `flatten`. Raises InputError, also for a name that leaves its folder."""
    try:
        listed = bytes(payload[-_LONGEST_LIST:])[::-1].lstrip(b"\0").decode("latin-1")
        nodes = json.JSONDecoder().raw_decode(listed)[0]["nodes"]
        return dict(_files_of(nodes, len(nodes) - 1, payload))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError("Core ML payload", f"has no list of files ({error})") from error


def _files_of(
    nodes: list[dict[str, Any]], index: int, payload: memoryview
) -> Iterator[tuple[str, memoryview]]:
    """Path and content of every file below a folder; children come before it in the list."""
    for name, child in nodes[index]["children"].items():
        if not 0 <= child < index or name in ("", ".", "..") or "/" in name or "\\" in name:
            raise ValueError(f"{name!r} is not the name of a file in its folder")
        if nodes[child]["kind"] == _DIRECTORY:
            for path, content in _files_of(nodes, child, payload):
                yield f"{name}/{path}", content
        else:
            start, size = (nodes[child]["dataRegion"][key] for key in ("offset", "size"))
            if not 0 <= start <= start + size <= len(payload):
                raise ValueError(f"{name} ends beyond the {len(payload)} bytes")
            yield name, payload[start : start + size]


@contextmanager
def embedded_package(program: Path) -> Iterator[Package]:
    """The package inside a .pte, taken out for as long as it is read. Raises InputError."""
    files = unflatten(delegate_payload(program, CoreMLBackend.__name__))
    with tempfile.TemporaryDirectory() as scratch:
        for name, content in files.items():
            path = Path(scratch) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        yield open_package(Path(scratch) / _PACKAGE)


class StepRunner:
    """A program that reads one token at a time, `step([token], position)` → logits."""

    def __init__(
        self, step: Callable[[list[int], int], Tensor], context: int, vocab_size: int
    ) -> None:
        self._step, self._position = step, 0
        self._context, self._vocab_size = context, vocab_size

    @property
    def context(self) -> int:
        return self._context

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    def prefill(self, tokens: list[int]) -> Tensor:
        check_room(len(tokens), self.context)
        self._position = 0
        return [self.decode(token) for token in tokens][-1]

    def decode(self, token: int) -> Tensor:
        check_room(self._position + 1, self.context)
        logits = self._step([token], self._position)
        self._position += 1
        return logits


def interpret_step(program: Path, context: int) -> StepRunner:
    """The embedded package in the reference interpreter, on any machine."""
    with embedded_package(program) as package:
        interpreter = Interpreter(package)
        vocab_size = int(package.spec.description.metadata.userDefined["vocab_size"])
    state = interpreter.new_state()

    def step(tokens: list[int], position: int) -> Tensor:
        inputs = {"input_ids": [tokens], "position": [position]}
        values = {
            name: Value(torch.tensor(given, dtype=torch.int32), "int32")
            for name, given in inputs.items()
        }
        return interpreter.run(MAIN, values, state)[LOGITS].data[0, -1]

    return StepRunner(step, context, vocab_size)
