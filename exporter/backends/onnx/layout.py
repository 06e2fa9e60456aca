"""The memory layout of codes and scales in an ONNX model.

`contrib` weights have the layout of ``MatMulNBits``: unsigned codes around a zero point, packed low
nibble first, with one scale per block. `portable` weights are standard INT4 and INT8 tensors,
transposed, since ONNX Runtime multiplies by no others without dequantizing all of them at each
step. So are int8 weights with one scale per row, for ``DynamicQuantizeMatMul``.
"""

import torch
from torch import Tensor

from exporter.backends.onnx.schemes import UNSIGNED, block_of
from exporter.quantization.packing import TWOS_COMPLEMENT
from exporter.quantization.schemes import QuantizedTensor


def block_size(weight: QuantizedTensor) -> int:
    """The group size, or for one scale per row the largest block that divides the row."""
    return block_of(weight.scheme, weight.codes.shape[1])


def block_scales(weight: QuantizedTensor) -> Tensor:
    """One scale per block [out_features, blocks]. A scale per row is repeated."""
    blocks = weight.codes.shape[1] // block_size(weight)
    return weight.scales.expand(-1, blocks) if weight.scales.shape[1] == 1 else weight.scales


def unsigned_bytes(weight: QuantizedTensor) -> bytes:
    """int4 codes plus 8, packed low nibble first, or int8 codes plus 128."""
    return _bytes(UNSIGNED.pack(weight.codes, weight.scheme.code_bits))


def codes_of_bytes(bits: int) -> Tensor:
    """The codes in each byte of `unsigned_bytes`: int8 [256, 8 // bits]."""
    return UNSIGNED.unpack(torch.arange(256, dtype=torch.uint8)[:, None], bits)


def transposed_bytes(weight: QuantizedTensor) -> bytes:
    """The bytes of an INT4 tensor (two's complement, low nibble first) or an INT8 tensor
    [in_features, out_features]. Two int4 codes of neighbouring rows share a byte."""
    return _bytes(TWOS_COMPLEMENT.pack(weight.codes.t().contiguous(), weight.scheme.code_bits))


def _bytes(packed: Tensor) -> bytes:
    content: bytes = packed.contiguous().numpy().tobytes()
    return content


def concatenate(weights: list[QuantizedTensor]) -> QuantizedTensor:
    """Concatenate weights of the same scheme along out_features."""
    if len(weights) == 1:
        return weights[0]
    codes = torch.cat([weight.codes for weight in weights])
    scales = torch.cat([weight.scales for weight in weights])
    return QuantizedTensor(codes, scales, weights[0].scheme)
