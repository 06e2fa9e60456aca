"""Schemes: how a weight is stored as symmetric integers and their scales.

A weight ``w`` [out_features, in_features] becomes codes ``q`` and scales ``s`` with
``w ≈ q * s``; groups of ``group_size`` inputs, or a whole row, share one scale.

A scheme defines the range of its codes, and its parts: the tensors that store a weight, with their
types and shapes, and their packing and unpacking. Code that writes weights (the quantized
checkpoint, the state of a distillation) iterates over the parts and names none of them.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from exporter.errors import InputError
from exporter.quantization.packing import TWOS_COMPLEMENT

GROUP_SIZES = (32, 64, 128, 256)
#: Bits of a code → the lowest and the highest one.
CODE_RANGE = {4: (-8, 7), 8: (-127, 127)}
#: The type of packed codes in the quantized checkpoint, by bits; a uint8 holds two int4 codes.
_CODE_TYPES = {4: torch.uint8, 8: torch.int8}

CODES, SCALES = "codes", "scales"


@dataclass(frozen=True)
class Scheme:
    """How one weight is stored: ``int4-g32``, ``int8`` (one scale per row), ``float``.

    `bits` is None for a weight that is left in float. Raises ValueError for unknown bits.
    """

    bits: int | None
    group_size: int | None = None

    def __post_init__(self) -> None:
        if self.bits is not None and self.bits not in CODE_RANGE:
            raise ValueError(f"there is no scheme of {self.bits} bits")

    def __str__(self) -> str:
        if self.bits is None:
            return "float"
        return f"int{self.bits}" + (f"-g{self.group_size}" if self.group_size else "")

    @property
    def code_bits(self) -> int:
        """The bits of a code. Raises ValueError for ``float``, which has no codes."""
        if self.bits is None:
            raise ValueError("a weight that is left in float has no codes")
        return self.bits

    @property
    def code_range(self) -> tuple[int, int]:
        """The lowest and the highest code."""
        return CODE_RANGE[self.code_bits]

    def problem_with(self, shape: tuple[int, ...]) -> str | None:
        """Why this scheme cannot store a weight of this shape, or None."""
        if self.bits is None:
            return None
        if len(shape) != 2:
            return f"{self} needs a matrix, this weight has shape {list(shape)}"
        if self.group_size and shape[1] % self.group_size:
            return f"groups of {self.group_size} do not divide its input width {shape[1]}"
        if self.bits == 4 and shape[1] % 2:
            return f"int4 needs an even input width, this weight has {shape[1]}"
        return None

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """The shape of the scales: [out_features, number of groups in a row]."""
        return shape[0], shape[1] // self.group_size if self.group_size else 1

    def parts(self, shape: tuple[int, ...]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """The tensors that store a weight of this shape: part → type and shape, in the order of
        the file. Raises ValueError for ``float``, which has no parts."""
        bits = self.code_bits
        return {
            CODES: (_CODE_TYPES[bits], (shape[0], shape[1] * bits // 8)),
            SCALES: (torch.float16, self.scale_shape(shape)),
        }

    def pack(self, quantized: "QuantizedTensor") -> dict[str, Tensor]:
        """Codes and scales as the tensors that `parts` describes."""
        bits = self.code_bits
        packed = TWOS_COMPLEMENT.pack(quantized.codes, bits)
        return {
            CODES: packed.view(_CODE_TYPES[bits]),
            SCALES: quantized.scales.to(torch.float16),
        }

    def unpack(self, part: Callable[[str], Tensor]) -> "QuantizedTensor":
        """The inverse of `pack`; `part` returns the tensor of a part by its name."""
        codes = TWOS_COMPLEMENT.unpack(part(CODES).view(torch.uint8), self.code_bits)
        return QuantizedTensor(codes, part(SCALES).to(torch.float32), self)

    def stored_bytes(self, shape: tuple[int, ...]) -> int:
        """The size of all parts of a weight of this shape, in bytes."""
        return sum(
            dtype.itemsize * torch.Size(size).numel() for dtype, size in self.parts(shape).values()
        )


FLOAT = Scheme(None)


def parse_scheme(text: object, subject: str) -> Scheme:
    """Parse ``int4-g32``, ``int4``, ``int8-g64``, ``int8`` or ``float``. Raises InputError."""
    if text == "float":
        return FLOAT
    match = re.fullmatch(r"int([48])(?:-g(\d+))?", text) if isinstance(text, str) else None
    if not match or (match[2] and int(match[2]) not in GROUP_SIZES):
        sizes = ", ".join(map(str, GROUP_SIZES))
        raise InputError(
            subject,
            f"{text!r} is not a scheme",
            f"Write int4-gN or int8-gN (N one of {sizes}), int4, int8 (one scale per row) or float",
        )
    return Scheme(int(match[1]), int(match[2]) if match[2] else None)


def every_scheme() -> Iterator[Scheme]:
    """Every supported scheme, smallest first; ``float`` is last."""
    for bits in sorted(CODE_RANGE):
        for group_size in (None, *reversed(GROUP_SIZES)):
            yield Scheme(bits, group_size)
    yield FLOAT


@dataclass(frozen=True)
class QuantizedTensor:
    """codes int8 [out_features, in_features]; scales float32 [out_features, groups]."""

    codes: Tensor
    scales: Tensor
    scheme: Scheme

    def dequantize(self) -> Tensor:
        """Codes times scales, float32 [out_features, in_features]."""
        grouped = self.codes.unflatten(1, (self.scales.shape[1], -1))
        weight: Tensor = (grouped * self.scales[:, :, None]).flatten(1)
        return weight


def entry_name(weight: str, part: str) -> str:
    """The name of a part of a weight in a file, such as ``lm_head.weight.codes``."""
    return f"{weight}.{part}"


def pack_entries(weights: Mapping[str, QuantizedTensor]) -> dict[str, Tensor]:
    """The parts of all these weights as the entries of a safetensors file."""
    return {
        entry_name(name, part): tensor
        for name, weight in weights.items()
        for part, tensor in weight.scheme.pack(weight).items()
    }


def unpack_entry(name: str, scheme: Scheme, entry: Callable[[str], Tensor]) -> QuantizedTensor:
    """Read a weight from a file of parts; `entry` returns a tensor of the file by its name."""
    return scheme.unpack(lambda part: entry(entry_name(name, part)))
