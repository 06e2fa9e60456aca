"""How the runtimes round activations before a matrix product, simulated in torch."""

from collections.abc import Callable

import torch
from torch import Tensor

#: Activations [..., seq, features] as a runtime rounds them before a matrix product.
Rounding = Callable[[Tensor], Tensor]


def round_rows_to_int8(x: Tensor) -> Tensor:
    """x as XNNPACK's dynamic int8 activations hold it: one scale and zero point for each row.

    Source: ``xnn_f32_qd8_asymmetric_quantization_params`` in XNNPACK's quantization.h; the range
    always includes zero.
    """
    return _round_over(x, (-1,))


def round_prompt_to_int8(x: Tensor, prompt: int) -> Tensor:
    """x [..., seq, features] as ONNX Runtime's DynamicQuantizeLinear holds it: one scale for all
    that is read at once, here the first `prompt` rows, and then for each row."""
    first, rest = x[..., :prompt, :], x[..., prompt:, :]
    return torch.cat((_round_over(first, (-2, -1)), _round_over(rest, (-1,))), -2)


#: The largest number that float16 holds.
LARGEST_HALF = 65504.0


def round_to_half(x: Tensor) -> Tensor:
    """x as float16 holds it."""
    return x.half().float()


def _round_over(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """8 bits with a scale and zero point common to `dims`."""
    if not x.numel():
        return x
    low = x.amin(dims, keepdim=True).clamp(max=0)
    high = x.amax(dims, keepdim=True).clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, 1.0, scale)
    zero_point = (-128 - low / scale).round().clamp(-128, 127)
    codes = ((x / scale).round() + zero_point).clamp(-128, 127)
    return (codes - zero_point) * scale


def round_blocks_to_int8(x: Tensor, block: int) -> Tensor:
    """x as ONNX Runtime's MatMulNBits holds it at accuracy level 4: symmetric blocks, those of
    the weight; a width that `block` does not divide is one block."""
    blocks = x.unflatten(-1, (-1, block if x.shape[-1] % block == 0 else x.shape[-1]))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    scale = torch.where(scale == 0, 1.0, scale)
    rounded: Tensor = ((blocks / scale).round() * scale).flatten(-2)
    return rounded
