"""Symmetric integers on a portable scale grid.

A weight ``w`` [out_features, in_features] becomes codes ``q`` and scales ``s`` with
``w ≈ q * s``; groups of ``group_size`` inputs, or a whole row, share one scale.

Every scale is exactly representable in bfloat16 AND in float16 (8 significant bits, at least
2^-14), because XNNPACK keeps group scales as bfloat16, Core ML as float16 and ONNX Runtime as
float32: on this grid they all hold the same number.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from exporter.errors import InputError

GROUP_SIZES = (32, 64, 128, 256)
CODE_RANGE = {4: (-8, 7), 8: (-127, 127)}
SMALLEST_SCALE = 2.0**-14
LARGEST_SCALE = 65280.0
#: Shares of the absolute maximum that `mse` tries as the range of a group.
CLIPPING_SHARES = torch.linspace(0.6, 1.1, 26)
_ROWS_AT_ONCE_VALUES = 1 << 18


@dataclass(frozen=True)
class Scheme:
    """How one weight is stored: ``int4-g32``, ``int8`` (one scale a row), ``float``."""

    bits: int | None
    group_size: int | None = None

    def __str__(self) -> str:
        if self.bits is None:
            return "float"
        return f"int{self.bits}" + (f"-g{self.group_size}" if self.group_size else "")

    def problem_with(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of this shape cannot be stored so, or None."""
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
        """[out_features, number of groups in a row]."""
        return shape[0], shape[1] // self.group_size if self.group_size else 1

    def stored_bytes(self, shape: tuple[int, ...]) -> int:
        """Codes and float16 scales of a weight of this shape."""
        assert self.bits is not None
        rows, groups = self.scale_shape(shape)
        return rows * (shape[1] * self.bits // 8 + 2 * groups)


FLOAT = Scheme(None)


def parse_scheme(text: object, subject: str) -> Scheme:
    """``int4-g32``, ``int4``, ``int8-g64``, ``int8`` or ``float``, or InputError."""
    if text == "float":
        return FLOAT
    match = re.fullmatch(r"int([48])(?:-g(\d+))?", text) if isinstance(text, str) else None
    if not match or (match[2] and int(match[2]) not in GROUP_SIZES):
        sizes = ", ".join(map(str, GROUP_SIZES))
        raise InputError(
            subject,
            f"{text!r} is not a scheme",
            f"Write int4-gN or int8-gN (N one of {sizes}), int4 or int8 (a scale a row), or float",
        )
    return Scheme(int(match[1]), int(match[2]) if match[2] else None)


@dataclass(frozen=True)
class QuantizedTensor:
    """codes int8 [out_features, in_features]; scales float32 [out_features, groups]."""

    codes: Tensor
    scales: Tensor
    scheme: Scheme

    def dequantize(self) -> Tensor:
        """The weight that the codes stand for, float32 [out_features, in_features]."""
        grouped = self.codes.unflatten(1, (self.scales.shape[1], -1))
        weight: Tensor = (grouped * self.scales[:, :, None]).flatten(1)
        return weight


def to_scale_grid(scales: Tensor) -> Tensor:
    """The nearest portable scale: bfloat16's 8 significant bits within float16's normal range."""
    on_grid = scales.to(torch.bfloat16).to(torch.float32)
    return on_grid.clamp(SMALLEST_SCALE, LARGEST_SCALE)


def quantize(weight: Tensor, scheme: Scheme, method: str) -> QuantizedTensor:
    """Round a weight [out_features, in_features] to codes.

    ``absmax`` takes the smallest scale that clips nothing; ``mse`` tries smaller ranges too and
    keeps, for each group, the scale of least squared error.
    """
    assert scheme.bits is not None
    lowest, highest = CODE_RANGE[scheme.bits]
    groups = scheme.scale_shape(tuple(weight.shape))[1]
    codes = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(weight.shape[0], groups)
    for rows in row_blocks(weight):
        block = weight[rows].to(torch.float32).unflatten(1, (groups, -1))
        widest = torch.maximum(block.amax(-1) / highest, block.amin(-1) / lowest)
        if method == "mse":
            scale = _least_squared_error(block, widest, lowest, highest)
        else:
            scale = to_scale_grid(widest)
        scales[rows] = scale
        codes[rows] = round_codes(block, scale, lowest, highest).flatten(1).to(torch.int8)
    return QuantizedTensor(codes, scales, scheme)


def row_blocks(weight: Tensor) -> Iterator[slice]:
    """Blocks of rows small enough to stay in the processor's cache."""
    rows = max(1, _ROWS_AT_ONCE_VALUES // weight.shape[1])
    return (slice(start, start + rows) for start in range(0, weight.shape[0], rows))


def round_codes(block: Tensor, scale: Tensor, lowest: int, highest: int) -> Tensor:
    """Codes, still as floats, of block [rows, groups, group_size] with scale [rows, groups]."""
    return (block / scale[..., None]).round_().clamp_(lowest, highest)


def least_squared_error_scales(weight: Tensor, scheme: Scheme, importance: Tensor) -> Tensor:
    """Scales [out_features, groups] of least squared error, where the error of each input counts
    as `importance` [in_features] says."""
    assert scheme.bits is not None
    lowest, highest = CODE_RANGE[scheme.bits]
    groups = scheme.scale_shape(tuple(weight.shape))[1]
    scales = torch.empty(weight.shape[0], groups)
    for rows in row_blocks(weight):
        block = weight[rows].to(torch.float32).unflatten(1, (groups, -1))
        widest = torch.maximum(block.amax(-1) / highest, block.amin(-1) / lowest)
        scales[rows] = _least_squared_error(
            block, widest, lowest, highest, importance.unflatten(0, (groups, -1))
        )
    return scales


def _least_squared_error(
    block: Tensor, widest: Tensor, lowest: int, highest: int, importance: Tensor | None = None
) -> Tensor:
    """The best scale on the grid for each group of block [rows, groups, group_size]."""
    best_scale, best_error = to_scale_grid(widest), torch.full_like(widest, torch.inf)
    for share in CLIPPING_SHARES.tolist():
        scale = to_scale_grid(widest * share)
        error = round_codes(block, scale, lowest, highest).mul_(scale[..., None]).sub_(block)
        error = error.square_()
        error = (error if importance is None else error.mul_(importance)).sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
    return best_scale


def pack_int4(codes: Tensor) -> Tensor:
    """Codes -8..7 [rows, columns] to two's complement nibbles, uint8 [rows, columns // 2]."""
    nibbles = codes.view(torch.uint8) & 0x0F
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """The inverse of `pack_int4`: int8 [rows, columns]."""
    signed = packed.view(torch.int8)
    return torch.stack(((signed << 4) >> 4, signed >> 4), -1).flatten(1)
