"""Rounding of weights to codes, with scales on a portable grid.

Every scale is exactly representable in bfloat16 and in float16 (8 significant bits, at least
2^-14), because XNNPACK stores group scales as bfloat16, Core ML as float16 and ONNX Runtime as
float32. On this grid all three store the same number.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from exporter.quantization.schemes import QuantizedTensor, Scheme

SMALLEST_SCALE = 2.0**-14
LARGEST_SCALE = 65280.0
#: The methods of `quantize`, which need no text.
ROUNDINGS = ("absmax", "mse")
#: Factors of the `absmax` scale that `mse` tries for each group.
CLIPPING_SHARES = torch.linspace(0.6, 1.1, 26)
_ROWS_AT_ONCE_VALUES = 1 << 18


def to_scale_grid(scales: Tensor) -> Tensor:
    """The nearest portable scale: bfloat16's 8 significant bits within float16's normal range."""
    on_grid = scales.to(torch.bfloat16).to(torch.float32)
    return on_grid.clamp(SMALLEST_SCALE, LARGEST_SCALE)


def quantize(weight: Tensor, scheme: Scheme, method: str) -> QuantizedTensor:
    """Round a weight [out_features, in_features] to codes.

    ``absmax`` takes the smallest scale that clips nothing. ``mse`` tries 0.6 to 1.1 times that
    scale and takes the one of least squared error, per group. Raises ValueError for another method.
    """
    if method not in ROUNDINGS:
        raise ValueError(f"{method!r} is not {' or '.join(ROUNDINGS)}")
    lowest, highest = scheme.code_range
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
    """Slices of rows that are small enough for the processor's cache."""
    rows = max(1, _ROWS_AT_ONCE_VALUES // weight.shape[1])
    return (slice(start, start + rows) for start in range(0, weight.shape[0], rows))


def round_codes(block: Tensor, scale: Tensor, lowest: int, highest: int) -> Tensor:
    """The codes, as floats, of block [rows, groups, group_size] with scale [rows, groups]."""
    return (block / scale[..., None]).round_().clamp_(lowest, highest)


def least_squared_error_scales(weight: Tensor, scheme: Scheme, importance: Tensor) -> Tensor:
    """Scales [out_features, groups] of least squared error, with the error of each input weighted
    by `importance` [in_features]."""
    lowest, highest = scheme.code_range
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
    """The portable scale of least squared error for each group of block [rows, groups, group_size].

    `widest` [rows, groups] is the smallest scale that clips nothing; `importance` is
    [groups, group_size].
    """
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


def problem_with_values(stored: QuantizedTensor) -> str | None:
    """What is wrong if a code is out of range or a scale is off the portable grid, else None."""
    lowest, highest = stored.scheme.code_range
    if stored.codes.min() < lowest or stored.codes.max() > highest:
        return f"has a code outside {lowest}..{highest}"
    on_grid = to_scale_grid(stored.scales)
    if not torch.equal(on_grid, stored.scales):
        worst = stored.scales[on_grid != stored.scales][0].item()
        return f"has the scale {worst}, which is not on the portable grid"
    return None
