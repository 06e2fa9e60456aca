"""The tensors of an MLX folder: their names, types and shapes, and how codes and scales are packed.

A quantized weight ``a.b.weight`` is three tensors: the codes ``a.b.weight`` as uint32 words, the
first code in the lowest bits, and ``a.b.scales`` and ``a.b.biases``, one for each group of a row.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from exporter.backends import Prediction
from exporter.backends._sizes import RUNTIME_BYTES
from exporter.backends._storage import wrong_bits
from exporter.errors import InputError
from exporter.model.config import ModelConfig
from exporter.model.equivalent import equivalent
from exporter.quantization.packing import Packing
from exporter.quantization.schemes import FLOAT, QuantizedTensor, Scheme

#: The sizes of a group that MLX has kernels for, the largest first.
GROUPS = (128, 64, 32)
#: Codes are unsigned: bits → what is added to ours.
OFFSETS = {4: 8, 8: 128}
PACKING = Packing(OFFSETS)
#: The target's type → that of torch.
TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

#: Name of a tensor in the file → type and shape.
Entries = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class Affine:
    """How MLX stores a quantized weight. `group` codes of a row share a scale and a bias."""

    bits: int
    group: int


def affine_of(scheme: Scheme, shape: tuple[int, ...]) -> Affine | None:
    """How a weight of this shape and scheme is stored, None for one that is left in float.

    Groups that MLX lacks, and whole rows, are stored in smaller groups of the same scale.
    """
    if scheme == FLOAT:
        return None
    width = scheme.group_size or shape[1]
    return Affine(scheme.code_bits, next(group for group in GROUPS if width % group == 0))


def stores(name: str, scheme: Scheme, shape: tuple[int, ...]) -> str | None:
    """The reason why MLX cannot store this weight in this scheme, or None."""
    if problem := wrong_bits(scheme, OFFSETS):
        return problem
    if scheme != FLOAT and shape[1] % GROUPS[-1]:
        return (
            f"its rows of {shape[1]} codes are no multiple of {GROUPS[-1]}, the smallest group of "
            "this format"
        )
    return None


def part(name: str, kind: str) -> str:
    """The name of the ``scales`` or ``biases`` of a weight."""
    return f"{name.removesuffix('.weight')}.{kind}"


def entries_of(
    name: str, shape: tuple[int, ...], affine: Affine | None, kind: torch.dtype
) -> Entries:
    """The tensors of one weight."""
    if affine is None:
        return {name: (kind, shape)}
    groups = shape[0], shape[1] // affine.group
    return {
        name: (torch.uint32, (shape[0], shape[1] * affine.bits // 32)),
        part(name, "scales"): (kind, groups),
        part(name, "biases"): (kind, groups),
    }


def pack(
    name: str, weight: QuantizedTensor, affine: Affine, kind: torch.dtype
) -> dict[str, Tensor]:
    """The three tensors of a quantized weight. Raises InputError if a bias is too large for its
    type."""
    groups = weight.codes.shape[1] // affine.group
    scales = weight.scales.repeat_interleave(groups // weight.scales.shape[1], 1)
    biases = -OFFSETS[affine.bits] * scales
    stored = scales.to(kind), biases.to(kind)
    if not (torch.equal(stored[0].float(), scales) and torch.equal(stored[1].float(), biases)):
        raise InputError(
            name,
            f"its largest scale is {weight.scales.max():g}, and MLX stores -{OFFSETS[affine.bits]} "
            f"times a scale, which {_shown(kind)} does not hold",
            "Set the target's activations to bfloat16 or float32",
        )
    words = PACKING.pack(weight.codes, affine.bits).view(torch.uint32)
    return {name: words, part(name, "scales"): stored[0], part(name, "biases"): stored[1]}


def unpack(
    name: str, words: Tensor, scales: Tensor, affine: Affine, scheme: Scheme
) -> tuple[QuantizedTensor, str]:
    """Codes and scales of a weight of this scheme, and what is wrong with repeated scales."""
    codes = PACKING.unpack(words.view(torch.uint8), affine.bits)
    groups = scheme.scale_shape(tuple(codes.shape))[1]
    if scheme.bits != affine.bits or scales.shape[1] % groups:
        raise InputError(
            name, f"is stored with {affine.bits} bits in groups of {affine.group}, not as {scheme}"
        )
    repeated = scales.float().unflatten(1, (groups, -1))
    first = repeated[:, :, :1]
    differ = int((repeated != first).any(-1).sum())
    problem = f"{differ} groups have several scales, and {scheme} has one" if differ else ""
    return QuantizedTensor(codes, first.squeeze(-1).contiguous(), scheme), problem


def wrong_biases(scales: Tensor, biases: Tensor, affine: Affine) -> str:
    """What is wrong with biases that are not the exact multiple of their scales, or ''."""
    expected = -OFFSETS[affine.bits] * scales.float()
    different = biases.float().view(torch.int32) != expected.view(torch.int32)  # as bits
    if not different.any():
        return ""
    first = tuple(different.nonzero()[0].tolist())
    return (
        f"{int(different.sum())} biases differ; at {list(first)} the file has "
        f"{biases[first].item():g}, -{OFFSETS[affine.bits]} times the scale is "
        f"{expected[first].item():g}"
    )


def exact(name: str, weight: Tensor, kind: torch.dtype) -> Tensor:
    """A float weight in this type. Raises InputError if the type does not hold it exactly.

    A weight of another type would change the type of everything that MLX computes after it.
    """
    stored = weight.to(kind)
    inexact = stored.float() != weight.float()
    if inexact.any():
        others = [
            other
            for other, dtype in TYPES.items()
            if torch.equal(weight.to(dtype).float(), weight.float())
        ]
        raise InputError(
            name,
            f"{_shown(kind)} does not hold {int(inexact.sum())} of its {inexact.numel()} values, "
            f"such as {weight[inexact][0].item():g}",
            f"Set the target's activations to {' or '.join(others)}",
        )
    return stored


def _shown(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")


def predict(
    config: ModelConfig, schemes: Mapping[str, Scheme], activations: str, context: int
) -> Prediction:
    """The size of the weight file, of the full cache, and of both in memory."""
    kind, file = TYPES[activations], 0
    for name, shape, scheme in _stored(config, schemes):
        for entry, (dtype, size) in entries_of(name, shape, affine_of(scheme, shape), kind).items():
            file += dtype.itemsize * math.prod(size) + len(entry) + _HEADER_BYTES
    cache = config.kv_cache_bytes(context, kind.itemsize)
    return Prediction(file, cache, file + cache + RUNTIME_BYTES)


#: Bytes of a tensor in the header of the file, besides its name.
_HEADER_BYTES = 68


def _stored(
    config: ModelConfig, schemes: Mapping[str, Scheme]
) -> Iterator[tuple[str, tuple[int, ...], Scheme]]:
    """Every weight of the equivalent model."""
    model = equivalent(config)
    shapes = model.config.parameter_shapes()
    for name, source in model.sources.items():
        yield name, shapes[name], schemes[source.name] if source.name else FLOAT
