"""Blocks of 32 codes and one scale: codes and scales into the bytes of GGUF and back.

Q4_0 (18 bytes): a float16 scale, then 16 bytes; byte i has code i in its low nibble and code i + 16
in the high one, 8 added to each. Q8_0 (34 bytes): a float16 scale, then 32 codes in int8. Both
layouts are those of ``block_q4_0`` and ``block_q8_0`` in llama.cpp's ggml-common.h.
"""

import torch
from torch import Tensor

from exporter.backends.gguf.schemes import BLOCK, BLOCK_TYPES
from exporter.quantization.packing import Packing
from exporter.quantization.schemes import QuantizedTensor, Scheme

_SCALE_BYTES = 2
#: Rows that are packed at once.
_ROWS = 4096
_PACKING = Packing({4: 8, 8: 0})


def pack(quantized: QuantizedTensor) -> Tensor:
    """Codes and scales as uint8 [out_features, in_features // 32, bytes of a block].

    The scale of a group is repeated for each of its blocks.
    """
    bits = quantized.scheme.code_bits
    rows, columns = quantized.codes.shape
    blocks = torch.empty(rows, columns // BLOCK, BLOCK_TYPES[bits][1], dtype=torch.uint8)
    for start in range(0, rows, _ROWS):  # in parts, since each step needs memory for a copy
        part = slice(start, start + _ROWS)
        _pack_rows(quantized.codes[part], quantized.scales[part], bits, blocks[part])
    return blocks


def _pack_rows(codes: Tensor, scales: Tensor, bits: int, blocks: Tensor) -> None:
    """Write codes [rows, columns] and scales [rows, groups] into `blocks`."""
    rows, count = blocks.shape[:2]
    repeated = scales.half().repeat_interleave(count // scales.shape[1], 1)
    packed = _PACKING.pack(_halves_in_pairs(codes) if bits == 4 else codes, bits)
    blocks[..., :_SCALE_BYTES] = repeated.view(torch.uint8).view(rows, count, _SCALE_BYTES)
    blocks[..., _SCALE_BYTES:] = packed.view(rows, count, -1)


def unpack(blocks: Tensor, scheme: Scheme) -> tuple[QuantizedTensor, list[int] | None]:
    """The inverse of `pack`, with codes of `scheme`'s bits.

    Also the place [row, group] of the first group whose blocks have unequal scales, or None. Such a
    group has the scale NaN, which no checkpoint has.
    """
    bits = scheme.code_bits
    rows, count = blocks.shape[:2]
    codes = _PACKING.unpack(blocks[..., _SCALE_BYTES:].flatten(1), bits)
    if bits == 4:
        codes = _pairs_in_halves(codes)
    scales = blocks[..., :_SCALE_BYTES].contiguous().view(torch.float16).view(rows, count)
    groups = scheme.scale_shape((rows, count * BLOCK))[1]
    if count % groups:
        groups = count
    grouped = scales.view(rows, groups, -1).view(torch.int16)
    unequal = (grouped != grouped[..., :1]).any(-1)
    found = scales.view(rows, groups, -1)[..., 0].float().masked_fill(unequal, torch.nan)
    first = unequal.nonzero()[0].tolist() if unequal.any() else None
    return QuantizedTensor(codes, found, scheme), first


def _halves_in_pairs(codes: Tensor) -> Tensor:
    """Columns of each block in the order 0, 16, 1, 17 …: a byte holds two adjacent columns."""
    return codes.view(len(codes), -1, 2, BLOCK // 2).transpose(-1, -2).flatten(1)


def _pairs_in_halves(codes: Tensor) -> Tensor:
    """The inverse of `_halves_in_pairs`."""
    return codes.view(len(codes), -1, BLOCK // 2, 2).transpose(-1, -2).flatten(1)
