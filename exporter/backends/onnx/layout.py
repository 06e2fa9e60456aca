"""How codes and scales lie in an ONNX model, and how they are found again.

`contrib` weights are those of ``MatMulNBits``: unsigned codes around a zero point, packed low
nibble first, one scale a block. `portable` weights are ONNX's own INT4 and INT8. int8 weights of
one scale a row may also lie transposed, for ``DynamicQuantizeMatMul``.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from exporter.backends.onnx.schemes import UNSIGNED, block_of
from exporter.quantization.packing import TWOS_COMPLEMENT
from exporter.quantization.schemes import QuantizedTensor, Scheme

#: How the codes of a layout lie in bytes; `transposed` ones are [in_features, out_features].
_PACKINGS = {"unsigned": UNSIGNED, "signed": TWOS_COMPLEMENT, "transposed": TWOS_COMPLEMENT}


def block_size(weight: QuantizedTensor) -> int:
    """The group size; for one scale a row, the largest block that divides the row."""
    return block_of(weight.scheme, weight.codes.shape[1])


def block_scales(weight: QuantizedTensor) -> Tensor:
    """One scale for each block [out_features, blocks]; a row's scale is repeated."""
    blocks = weight.codes.shape[1] // block_size(weight)
    return weight.scales.expand(-1, blocks) if weight.scales.shape[1] == 1 else weight.scales


def unsigned_bytes(weight: QuantizedTensor) -> bytes:
    """Codes plus 8 in nibbles, low one first; int8 codes plus 128."""
    return _bytes(UNSIGNED.pack(weight.codes, weight.scheme.code_bits))


def signed_bytes(weight: QuantizedTensor) -> bytes:
    """ONNX's INT4 (two's complement nibbles, low one first) or INT8."""
    return _bytes(TWOS_COMPLEMENT.pack(weight.codes, weight.scheme.code_bits))


def transposed_bytes(weight: QuantizedTensor) -> bytes:
    """int8 codes [in_features, out_features]."""
    return _bytes(TWOS_COMPLEMENT.pack(weight.codes.t(), weight.scheme.code_bits))


def _bytes(packed: Tensor) -> bytes:
    content: bytes = packed.contiguous().numpy().tobytes()
    return content


@dataclass(frozen=True)
class StoredWeight:
    """What was found in a model: bytes, how they lie there, and scales [out_features, blocks]."""

    layout: str
    content: bytes
    scales: np.ndarray

    def decode(self, scheme: Scheme, shape: tuple[int, ...]) -> QuantizedTensor:
        """Codes and scales of a weight [out_features, in_features] of this scheme."""
        raw = torch.from_numpy(np.frombuffer(self.content, np.uint8).copy())
        transposed = self.layout == "transposed"
        packed = raw.view(shape[1] if transposed else shape[0], -1)
        codes = _PACKINGS[self.layout].unpack(packed, scheme.code_bits)
        codes = codes.t().contiguous() if transposed else codes
        scales = torch.from_numpy(self.scales.astype(np.float32)).view(shape[0], -1)
        by_row = scheme.scale_shape(shape)[1] == 1
        if by_row and (scales == scales[:, :1]).all():
            scales = scales[:, :1].contiguous()
        return QuantizedTensor(codes, scales, scheme)


def concatenate(weights: list[QuantizedTensor]) -> QuantizedTensor:
    """Several weights of one scheme over the same input, stacked along their outputs."""
    if len(weights) == 1:
        return weights[0]
    codes = torch.cat([weight.codes for weight in weights])
    scales = torch.cat([weight.scales for weight in weights])
    return QuantizedTensor(codes, scales, weights[0].scheme)
