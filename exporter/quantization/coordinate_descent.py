"""Coordinate descent after GPTQ: each scale and code once more, now that all others are known.

GPTQ rounds a column knowing those before it only, with scales that were chosen before any code.
Here both take turns: the scales of a row are the solution of a small system of equations, and each
code is the best one for all others as they are (compare QuantEase, arXiv 2309.01885). Neither step
can make a product worse.
"""

import torch
from torch import Tensor

from exporter.quantization.gptq import COLUMNS_AT_ONCE, GptqResult, damped
from exporter.quantization.rounding import to_scale_grid
from exporter.quantization.schemes import QuantizedTensor

_ROUNDS = 3
_ROWS_AT_ONCE_VALUES = 1 << 22
#: Share of its diagonal that is added to a system of equations, which may be singular.
_RIDGE = 1e-4
#: How far from its code, in codes, a weight may be taken to lie.
_INSIDE = 0.499


def coordinate_descent(
    weight: Tensor, hessian: Tensor, start: QuantizedTensor, damping: float = 0.01
) -> GptqResult:
    """Improve `start`, a rounding of `weight` [out_features, in_features].

    `hessian` and `damping` are those of `gptq`. The weight that comes back has each value where it
    would lie best for all other codes as they are, if it need not be whole.
    """
    weight, hessian = weight.float(), damped(hessian, damping)
    codes, scales = start.codes.float(), start.scales
    for _ in range(_ROUNDS):
        scales = _best_scales(weight, hessian, codes, scales)
        codes = _better_codes(weight, hessian, codes, scales, *start.scheme.code_range)
    by_column = scales.repeat_interleave(codes.shape[1] // scales.shape[1], 1)
    pull = ((codes * by_column - weight) @ hessian) / hessian.diagonal() / by_column
    exact = (codes - pull.clamp_(-_INSIDE, _INSIDE)) * by_column
    return GptqResult(QuantizedTensor(codes.to(torch.int8), scales, start.scheme), exact)


def _best_scales(weight: Tensor, hessian: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """The portable scales [out_features, groups] of least error for these codes; a row that
    rounding to the portable grid would make worse keeps its own."""
    groups = scales.shape[1]
    by_group = hessian.unflatten(0, (groups, -1))
    found = torch.empty_like(scales)
    rows_at_once = max(1, _ROWS_AT_ONCE_VALUES // (groups * weight.shape[1]))
    for start in range(0, len(weight), rows_at_once):
        rows = slice(start, start + rows_at_once)
        grouped = codes[rows].unflatten(1, (groups, -1))
        # [groups, rows, in_features]: what each group's codes alone give, seen by the Hessian
        seen = grouped.transpose(0, 1) @ by_group
        matrix = (seen.unflatten(2, (groups, -1)) * grouped).sum(-1).transpose(0, 1)
        own = scales[rows]
        rest = (weight[rows] - (grouped * own[..., None]).flatten(1)) @ hessian
        missing = (grouped * rest.unflatten(1, (groups, -1))).sum(-1)
        diagonal = matrix.diagonal(dim1=1, dim2=2)
        ridge = torch.where(diagonal > 0, _RIDGE * diagonal, 1.0)  # where all codes are 0
        change = torch.linalg.solve((matrix + ridge.diag_embed()).double(), missing.double())
        new = to_scale_grid(own + change.float())
        # What the error, a square, loses by it.
        change = new - own
        gain = (change * (2 * missing - (matrix @ change[..., None])[..., 0])).sum(1)
        found[rows] = torch.where((gain > 0)[:, None], new, own)
    return found


def _better_codes(
    weight: Tensor, hessian: Tensor, codes: Tensor, scales: Tensor, lowest: int, highest: int
) -> Tensor:
    """Every code once, inputs of the largest norm first."""
    order = hessian.diagonal().argsort(descending=True, stable=True)
    hessian = hessian[order][:, order]
    group = order // (weight.shape[1] // scales.shape[1])
    # One row a column of the weight: what is changed together lies together.
    scale, found = scales.t().contiguous(), codes.t()[order].contiguous()
    slope = hessian @ (found * scale[group] - weight.t()[order])
    for start in range(0, len(found), COLUMNS_AT_ONCE):
        block = slice(start, min(start + COLUMNS_AT_ONCE, len(found)))
        changes = torch.empty_like(found[block])
        for column in range(block.start, block.stop):
            step = scale[group[column]]
            best = found[column] - slope[column] / (hessian[column, column] * step)
            best = best.round_().clamp_(lowest, highest)
            change = (best - found[column]).mul_(step)
            found[column], changes[column - start] = best, change
            slope[column + 1 : block.stop].addr_(hessian[column + 1 : block.stop, column], change)
        slope[block.stop :].addmm_(hessian[block.stop :, block], changes)
    return found[order.argsort()].t().contiguous()
