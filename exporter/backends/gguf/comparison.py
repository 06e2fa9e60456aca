"""How a GGUF file differs from another, by metadata and by content.

Compared are the version of the format, every key with its type and value, and every tensor with its
type, shape and data. Left out are the order of keys and of tensors, and the bytes between and after
the data: llama.cpp finds keys and tensors by name.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType

from exporter.backends import _comparison
from exporter.backends.gguf.contents import Contents, open_contents


def differences(found: Path, expected: Path) -> Iterator[tuple[str, str]]:
    """How the file `found` differs from `expected`. Raises InputError."""
    one, other = _plain(open_contents(found)), _plain(open_contents(expected))
    return _comparison.differences(one, other)


def _plain(contents: Contents) -> dict[str, Any]:
    return {
        "version": contents.version,
        "metadata": {
            key: {"type": value.type, "value": value.value}
            for key, value in contents.metadata.items()
        },
        "tensors": {
            name: {"type": tensor.type.name, "shape": tensor.shape, "data": _data(contents, name)}
            for name, tensor in contents.tensors.items()
        },
    }


def _data(contents: Contents, name: str) -> Any:
    """The data of a tensor: floats as such, blocks as their bytes."""
    data = contents.bytes_of(name)
    is_float = contents.tensors[name].type == GGMLQuantizationType.F32
    return data.view("<f4") if is_float else data
