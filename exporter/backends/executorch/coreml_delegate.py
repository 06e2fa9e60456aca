"""The Core ML delegate inside a .pte: the whole decoder is one call of an embedded package.

    mobilellm lower build/nano-int4 --target executorch delegate=coreml activations=float16 ...

ExecuTorch's own partitioner traces the model and lets coremltools convert it, which would compute
new scales. But the runtime needs only a package and the names of its inputs and outputs, as one
payload. So the package holds the program of `coreml.graph`, with the quantized checkpoint's codes
and scales.

The runtime keeps a separate state for each method of a .pte (``ETCoreMLModel.mm``): a decode method
could not read the cache of a prefill method. So there is one method, which reads one token per
call. The official runners feed a prompt to it token by token. A new text needs no new state, since
later positions are masked.
"""

import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# First: it imports coremltools without warnings, before the compiler imports it.
from exporter.backends.coreml.toolkit import coremltools  # isort: skip
from executorch import exir
from executorch.backends.apple.coreml.compiler import CoreMLBackend
from executorch.exir.lowered_backend_module import LoweredBackendModule

from exporter.backends.coreml import Target
from exporter.backends.coreml.graph import LOGITS
from exporter.backends.coreml.interpreter import Interpreter
from exporter.backends.coreml.lowering import write_package
from exporter.backends.coreml.package import Package, Value, open_package
from exporter.backends.coreml.program import MAIN, build_step
from exporter.backends.coreml.running import (
    AS_IT_IS,
    WITHOUT_FLOAT32,
    check_room,
    without_float32,
)
from exporter.backends.executorch.file import delegate_payload
from exporter.errors import InputError
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint

#: An upper bound for the file list at the end of a payload, in bytes. It lists four files.
_LONGEST_LIST = 1 << 16
_FOLDER, _PACKAGE, METADATA = "lowered_module", "model.mlpackage", "metadata.json"
_FILE, _DIRECTORY = 0, 1


class _Call(nn.Module):
    """Call the delegate: tokens [1, 1] and position [1] to logits [1, 1, vocab_size]."""

    def __init__(self, delegate: nn.Module) -> None:
        super().__init__()
        self.delegate = delegate

    def forward(self, tokens: Tensor, start: Tensor) -> Tensor:
        logits: Tensor = self.delegate(tokens, start)
        return logits


class _StandIn(nn.Module):
    """A module with the delegate's input and output shapes and dtypes, for export."""

    def __init__(self, vocab_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.vocab_size, self.dtype = vocab_size, dtype

    def forward(self, tokens: Tensor, start: Tensor) -> Tensor:
        return (tokens + start).unsqueeze(-1).to(self.dtype).expand(1, 1, self.vocab_size)


def export_step(quantized: QuantizedCheckpoint, target: Target) -> torch.export.ExportedProgram:
    """The program: one call of the delegate, whose payload contains the package."""
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
            # The Neural Engine computes int4 in blocks wrongly (apple/coreai-models 279).
            compute_unit=coremltools.ComputeUnit.CPU_AND_GPU,
        ),
    )
    return torch.export.export(_Call(delegate), example, strict=False)


def _payload(quantized: QuantizedCheckpoint, target: Target) -> bytes:
    """The package and its metadata as the runtime reads them.

    The identifier, under which a phone caches the compiled model, is a hash of the package.
    """
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        specification = write_package(build_step(quantized, target), quantized, target, root)
        paths = sorted(path for path in root.rglob("*") if path.is_file())
        files = {f"{_PACKAGE}/{path.relative_to(root)}": path.read_bytes() for path in paths}
    described = specification.description
    metadata = {
        "inputNames": [given.name for given in described.input],
        "outputNames": [output.name for output in described.output],
        "identifier": identifier(files),
    }
    return flatten({METADATA: json.dumps(metadata).encode(), **files})


def identifier(files: Mapping[str, bytes | memoryview]) -> str:
    """The name under which a phone caches the compiled model: a hash of the files of a package."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(files[name])
    return f"executorch_{digest.hexdigest()}"


def flatten(files: Mapping[str, bytes]) -> bytes:
    """A folder as bytes, in the format of the runtime's ``inmemory_filesystem.cpp``.

    The content of the files comes first, then a JSON list of files and folders. The list is stored
    backwards, so that a reader finds it from the end. The executorch wheel has a function for this,
    but the order of its files depends on the disk.
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
    """The inverse of `flatten`. Raises InputError for damaged lists and unsafe file names."""
    try:
        listed = bytes(payload[-_LONGEST_LIST:])[::-1].lstrip(b"\0").decode("latin-1")
        decoder = json.JSONDecoder(object_pairs_hook=_entries)
        nodes = decoder.raw_decode(listed)[0]["nodes"]
        return _entries(list(_files_of(nodes, len(nodes) - 1, payload)))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError("Core ML payload", f"has no list of files ({error})") from error


def _entries(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dictionary. A name that occurs twice is refused: the runtime may read the other one."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _files_of(
    nodes: list[dict[str, Any]], index: int, payload: memoryview
) -> Iterator[tuple[str, memoryview]]:
    """Path and content of every file below a folder. Children precede their folder in `nodes`."""
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


def payload_files(program: Path) -> dict[str, memoryview]:
    """The files of the payload in a .pte: its metadata and the package. Raises InputError."""
    return unflatten(delegate_payload(program, CoreMLBackend.__name__))


@contextmanager
def embedded_package(program: Path) -> Iterator[Package]:
    """The package inside a .pte, extracted to a temporary folder. Raises InputError."""
    files = payload_files(program)
    with tempfile.TemporaryDirectory() as scratch:
        for name, content in files.items():
            path = Path(scratch) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        yield open_package(Path(scratch) / _PACKAGE)


class StepRunner:
    """A `Runner` of a program that reads one token per call: `step([token], position)` → logits."""

    def __init__(
        self, step: Callable[[list[int], int], Tensor], context: int, vocab_size: int
    ) -> None:
        self._step, self._position = step, 0
        self.context, self.vocab_size = context, vocab_size

    def prefill(self, tokens: list[int]) -> Tensor:
        check_room(len(tokens), self.context)
        self._position = 0
        return [self.decode(token) for token in tokens][-1]

    def decode(self, token: int) -> Tensor:
        check_room(self._position + 1, self.context)
        logits = self._step([token], self._position)
        self._position += 1
        return logits


def cross_checks(program: Path, target: Target) -> tuple[str, ...]:
    """The reference interpreter, if the runtime runs the delegate; and, if activations are float16
    but something else is float32, the interpreter without float32."""
    interpreter = (AS_IT_IS,) if sys.platform == "darwin" else ()
    with embedded_package(program) as package:
        return interpreter + without_float32(target, package)


def interpret_step(program: Path, context: int, variant: str) -> StepRunner:
    """The embedded package in the reference interpreter, on any machine. Raises InputError."""
    with embedded_package(program) as package:
        half = variant == WITHOUT_FLOAT32 or not package.has_float32
        interpreter = Interpreter(package, half)
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
