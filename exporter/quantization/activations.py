"""The runtimes' rounding of activations, simulated in torch: before a matrix product with a weight,
and in the KV cache."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

#: Maps activations [..., seq, features] to the values that a runtime rounds them to.
Rounding = Callable[[Tensor], Tensor]
#: Maps queries, keys and values [..., heads, head_dim] to those with which a runtime's attention
#: computes. The keys and values are those of its cache.
CacheRounding = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Roundings:
    """All that a runtime rounds: the inputs of products with weights, and queries, keys and values
    before attention. None where it does not round."""

    inputs: Rounding | None = None
    cache: CacheRounding | None = None

    def __bool__(self) -> bool:
        return self.inputs is not None or self.cache is not None


def round_rows_to_int8(x: Tensor) -> Tensor:
    """Round x as XNNPACK's dynamic int8 activations do: one scale and zero point per row.

    Source: ``xnn_f32_qd8_asymmetric_quantization_params`` in XNNPACK's quantization.h; the range
    always includes zero.
    """
    return _round_over(x, (-1,))


def round_heads_to_int8(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Round queries, keys and values as ExecuTorch's quantized attention does: one scale and zero
    point per head of a token.

    Source: ``calculate_scale_and_zero_point`` in ExecuTorch's op_choose_qparams.cpp. Its scales are
    at least 6.1e-5, which is not simulated.
    """
    return round_rows_to_int8(q), round_rows_to_int8(k), round_rows_to_int8(v)


def round_prompt_to_int8(x: Tensor, prompt: int, chunk: int) -> Tensor:
    """Round x [..., seq, features] as ONNX Runtime's DynamicQuantizeLinear does, one scale a call.

    A call reads up to `chunk` of the first `prompt` rows (prefill), or one later row (decode).
    """
    first, rest = x[..., :prompt, :], x[..., prompt:, :]
    calls = [_round_over(rows, (-2, -1)) for rows in first.split(chunk, -2)]
    return torch.cat((*calls, _round_over(rest, (-1,))), -2)


#: The largest finite float16 number.
LARGEST_HALF = 65504.0


def round_to_half(x: Tensor) -> Tensor:
    """Round x to float16; the result is float32."""
    return x.half().float()


def round_to_bfloat16(x: Tensor) -> Tensor:
    """Round x to bfloat16; the result is float32."""
    return x.bfloat16().float()


def _round_over(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Round to 8 bits, asymmetric, with one scale and zero point over `dims`."""
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
    """Round x as ONNX Runtime's MatMulNBits does at accuracy level 4: int8, symmetric, in blocks of
    `block` features like the weight. If `block` does not divide the width, a row is one block."""
    blocks = x.unflatten(-1, (-1, block if x.shape[-1] % block == 0 else x.shape[-1]))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    scale = torch.where(scale == 0, 1.0, scale)
    rounded: Tensor = ((blocks / scale).round() * scale).flatten(-2)
    return rounded


def round_blocks_to_q8_0(x: Tensor) -> Tensor:
    """Round x as llama.cpp does before a product with Q4_0 or Q8_0: int8, symmetric, in blocks of
    32 features, with the scale kept as float16.

    Source: ``quantize_row_q8_0`` and ``ggml_quantize_mat_q8_0_4x8`` in ggml-cpu/arch/x86. The codes
    are of the scale in float32. Halves are rounded to even there, and away from zero on Arm.
    """
    blocks = x.unflatten(-1, (-1, 32))
    largest = blocks.abs().amax(-1, keepdim=True)
    factor = torch.where(largest == 0, 0.0, 127 / largest)
    rounded: Tensor = ((blocks * factor).round() * (largest / 127).half()).flatten(-2)
    return rounded
