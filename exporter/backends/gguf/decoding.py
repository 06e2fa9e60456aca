"""Every weight of a GGUF file, decoded as the file describes it.

A weight is the tensor that llama.cpp reads for it in the family that the file names, with the type
and the shape that the file states.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from exporter.backends.gguf import blocks
from exporter.backends.gguf.contents import Contents
from exporter.backends.gguf.names import OUTPUT_TENSOR, as_written, tensor_names
from exporter.backends.gguf.schemes import BLOCK_TYPES
from exporter.errors import InputError, short
from exporter.model.config import EMBEDDING
from exporter.quantization.equivalent_checkpoint import EquivalentCheckpoint
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint
from exporter.quantization.schemes import QuantizedTensor, Scheme

_REMEDY = "Lower the model again"
_FLOATS = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
#: Type of blocks → bits of a code.
_BITS = {GGMLQuantizationType[name]: bits for bits, (name, _) in BLOCK_TYPES.items()}


@dataclass(frozen=True)
class _Decoded:
    """A weight in the order of rows of the file, and what is wrong with it, or ''."""

    weight: QuantizedTensor | Tensor
    problem: str


def read_weights(
    contents: Contents, quantized: QuantizedCheckpoint
) -> Iterator[tuple[str, str, QuantizedTensor | Tensor]]:
    """Every weight: its name, the tensor that holds it, and codes and scales or floats.

    Raises InputError for a file of another family. Raises it at the end for a tensor that is no
    weight of the checkpoint, and for the weights of a norm that has none there, unless they are
    ones.
    """
    known = as_written(quantized)
    if contents.architecture != known.config.model_type:
        raise InputError(
            f"{contents.path}: general.architecture",
            f"is {short(contents.architecture)}, not {known.config.model_type!r}",
            _REMEDY,
        )
    names, seen, not_ones = tensor_names(known.config), set[str](), list[str]()
    for name, tensor in names.items():
        for stored in _copies(name, tensor, known):
            if stored not in contents.tensors:
                continue
            seen.add(stored)
            source = known.model.sources[name].name
            decoded = _decode(contents, stored, known.schemes[name])
            if source is None:
                if not _equal(decoded.weight, known.read(name)):
                    not_ones.append(stored)
            else:
                place = f"{stored}{decoded.problem}"
                yield source, place, _restored(known, name, decoded.weight)
    if others := sorted(contents.tensors.keys() - seen):
        raise InputError(f"{contents.path}: {others[0]}", "is no weight of the checkpoint", _REMEDY)
    if not_ones:
        problem = "is not ones everywhere: the model's norm has no weights"
        raise InputError(f"{contents.path}: {not_ones[0]}", problem, _REMEDY)


def _equal(one: QuantizedTensor | Tensor, other: QuantizedTensor | Tensor) -> bool:
    return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)


def _copies(name: str, tensor: str, known: EquivalentCheckpoint) -> tuple[str, ...]:
    """The tensors that hold a weight: llama.cpp prefers an output layer of its own to a tied
    embedding."""
    tied = name == EMBEDDING and known.config.tie_word_embeddings
    return (tensor, OUTPUT_TENSOR) if tied else (tensor,)


def _restored(
    known: EquivalentCheckpoint, name: str, weight: QuantizedTensor | Tensor
) -> QuantizedTensor | Tensor:
    values = weight.codes if isinstance(weight, QuantizedTensor) else weight
    if tuple(values.shape) != known.config.parameter_shapes()[name]:
        return weight  # has no such rows, as the comparison of shapes tells
    return known.restore(name, weight)


def _decode(contents: Contents, name: str, scheme: Scheme) -> _Decoded:
    """The tensor of this name. `scheme` gives the groups, which the file repeats scales for."""
    tensor, data = contents.tensors[name], np.array(contents.bytes_of(name))
    values = torch.from_numpy(data)
    if tensor.type in _FLOATS:
        floats = values.view(_FLOATS[tensor.type]).view(tensor.shape)
        return _Decoded(floats.float(), "")
    bits = _BITS.get(tensor.type)
    if bits is None or len(tensor.shape) != 2:
        raise InputError(
            f"{contents.path}: {name}",
            f"is {tensor.type.name} of shape {list(tensor.shape)}, which this tool does not write",
            _REMEDY,
        )
    size = BLOCK_TYPES[bits][1]
    weight, unequal = blocks.unpack(
        values.view(tensor.shape[0], -1, size), Scheme(bits, scheme.group_size)
    )
    problem = f", whose blocks in group {unequal} have unequal scales" if unequal else ""
    return _Decoded(weight, problem)
