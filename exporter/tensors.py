"""Safetensors files: the header of a foreign file, and files written tensor by tensor."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from devices.files import replacing
from exporter.errors import InputError
from exporter.foreign import JSON_BYTES, open_regular, parse_json, present

SAFETENSORS_NAMES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.uint8: "U8",
}
_DTYPES = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}


def read_header(
    file: Path, remedy: str = "Get the file again"
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The dtype and the shape of every tensor of a foreign file: name → (dtype, shape), sorted.

    Raises InputError for a file that may not be read, a header over the limits of JSON, a name that
    is there twice, and tensors that overlap, leave a gap or lie outside of the file.
    """

    def broken(reason: object) -> InputError:
        return InputError(file, f"is not a whole safetensors file ({reason})", remedy)

    if not present(file):
        raise broken("no such file")
    with open_regular(file) as opened:
        size = int.from_bytes(opened.read(8), "little")
        if size > JSON_BYTES:
            raise broken(f"its header has {size:,} bytes; the limit is {JSON_BYTES:,}")
        header = opened.read(size)
    try:
        with safe_open(file, framework="pt") as handle:
            views = {name: handle.get_slice(name) for name in sorted(handle.keys())}
            found = {name: (v.get_dtype(), tuple(v.get_shape())) for name, v in views.items()}
    except (SafetensorError, OSError) as error:
        raise broken(error) from error
    parse_json(header, f"{file}: header", remedy)  # the library accepts a name that is there twice
    return found


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """The bytes of a tensor, of its dtype and shape in a header."""
    return _DTYPES[dtype].itemsize * math.prod(shape)


@contextmanager
def open_own(path: Path) -> Iterator[Any]:
    """Open a safetensors file of the cache or of a resumed run, as `safe_open` does. Raises
    InputError for one that is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        remedy = "Delete it, and run the same command again"
        raise InputError(path, f"is damaged ({error})", remedy) from error


def write_safetensors(
    path: Path,
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensor: Callable[[str], torch.Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file one tensor at a time, so at most one tensor is in memory.

    `layout` gives the type and shape of every tensor in file order; `tensor` returns the tensor of
    a name and is called in that order.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, (dtype, shape) in layout.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": SAFETENSORS_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (dtype, shape) in layout.items():
            value = tensor(name)
            assert value.dtype == dtype and tuple(value.shape) == shape, name
            file.write(value.reshape(-1).view(torch.uint8).numpy().data)


def write_tensors(
    path: Path, entries: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors that are all in memory as a safetensors file."""
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in entries.items()}
    write_safetensors(path, layout, entries.__getitem__, {"format": "pt", **(metadata or {})})
