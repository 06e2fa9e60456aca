"""How codes and scales lie in an ONNX model, and how they are found again.

`contrib` weights are those of ``MatMulNBits``: unsigned codes around a zero point, packed low
nibble first, one scale a block. `portable` weights are ONNX's own INT4 and INT8. int8 weights of
one scale a row may also lie transposed, for ``DynamicQuantizeMatMul``.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from exporter.quantization.schemes import QuantizedTensor, pack_int4, unpack_int4

#: The largest block that ONNX Runtime's kernels are made for.
LARGEST_BLOCK = 256
SMALLEST_BLOCK = 16


def block_size(weight: QuantizedTensor) -> int:
    """The group size; for one scale a row, the largest block that divides the row."""
    if weight.scheme.group_size:
        return weight.scheme.group_size
    columns, block = weight.codes.shape[1], LARGEST_BLOCK
    while columns % block:
        block //= 2
    return block


def block_scales(weight: QuantizedTensor) -> Tensor:
    """One scale for each block [out_features, blocks]; a row's scale is repeated."""
    blocks = weight.codes.shape[1] // block_size(weight)
    return weight.scales.expand(-1, blocks) if weight.scales.shape[1] == 1 else weight.scales


def unsigned_bytes(weight: QuantizedTensor) -> bytes:
    """Codes plus 8 in nibbles, low one first; int8 codes plus 128."""
    if weight.scheme.bits == 8:
        return (weight.codes.to(torch.int16) + 128).to(torch.uint8).numpy().tobytes()
    return pack_int4(weight.codes ^ -8).numpy().tobytes()


def signed_bytes(weight: QuantizedTensor) -> bytes:
    """ONNX's INT4 (two's complement nibbles, low one first) or INT8."""
    codes = pack_int4(weight.codes) if weight.scheme.bits == 4 else weight.codes
    content: bytes = codes.contiguous().numpy().tobytes()
    return content


def transposed_bytes(weight: QuantizedTensor) -> bytes:
    """int8 codes [in_features, out_features]."""
    content: bytes = weight.codes.t().contiguous().numpy().tobytes()
    return content


@dataclass(frozen=True)
class StoredWeight:
    """What was found in a model: bytes, how they lie there, and scales [out_features, blocks]."""

    layout: str
    content: bytes
    scales: np.ndarray

    def decode(self, like: QuantizedTensor) -> QuantizedTensor:
        """Codes and scales of a weight that is stored in the quantized checkpoint as `like` is."""
        rows, columns = like.codes.shape
        raw = torch.from_numpy(np.frombuffer(self.content, np.uint8).copy())
        if self.layout == "transposed":
            codes = raw.view(torch.int8).view(columns, rows).t().contiguous()
        elif like.scheme.bits == 4:
            codes = unpack_int4(raw.view(rows, columns // 2))
            codes = codes ^ -8 if self.layout == "unsigned" else codes
        elif self.layout == "unsigned":
            codes = (raw.to(torch.int16) - 128).to(torch.int8).view(rows, columns)
        else:
            codes = raw.view(torch.int8).view(rows, columns)
        scales = torch.from_numpy(self.scales.astype(np.float32)).view(rows, -1)
        if like.scales.shape[1] == 1 and (scales == scales[:, :1]).all():
            scales = scales[:, :1].contiguous()
        return QuantizedTensor(codes, scales, like.scheme)


def concatenate(weights: list[QuantizedTensor]) -> QuantizedTensor:
    """Several weights of one scheme over the same input, stacked along their outputs."""
    if len(weights) == 1:
        return weights[0]
    codes = torch.cat([weight.codes for weight in weights])
    scales = torch.cat([weight.scales for weight in weights])
    return QuantizedTensor(codes, scales, weights[0].scheme)
