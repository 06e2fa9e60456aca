"""int4 codes with one scale a row as palettes: for each row the 16 values that a code can mean.

The entry of a code is code * scale. float16 holds it exactly: a scale has at most 8 significant
bits (see `exporter.quantization.schemes`) and a code 3 bits or a power of two.
"""

import numpy as np
import torch
from torch import Tensor

from exporter.errors import InputError
from exporter.quantization.schemes import CODE_RANGE, QuantizedTensor, Scheme

_LOWEST, _HIGHEST = CODE_RANGE[4]
_CODES = torch.arange(_LOWEST, _HIGHEST + 1)


def make_palettes(stored: QuantizedTensor, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Indices uint8 [out_features, in_features] and palettes float16 [out_features, 1, 16, 1].

    Raises InputError for scales whose palette float16 does not hold exactly.
    """
    entries = _entries(stored.scales)
    palettes = entries.half()
    if not torch.equal(palettes.float(), entries):
        raise InputError(
            name,
            "has a scale of which float16 does not hold every multiple up to 8",
            "Set compute to cpu_and_gpu",
        )
    indices = (stored.codes - _LOWEST).to(torch.uint8)
    return indices.numpy(), palettes[:, None, :, None].numpy()


def read_palettes(indices: Tensor, palettes: Tensor, scheme: Scheme, name: str) -> QuantizedTensor:
    """The inverse of `make_palettes`: the codes and scales of indices and float32 palettes.

    Raises InputError for palettes that are not a scale times each code.
    """
    if palettes.shape != (indices.shape[0], 1, len(_CODES), 1):
        shape = list(palettes.shape)
        raise InputError(name, f"has palettes {shape}, not one of {len(_CODES)} values for a row")
    found = palettes.reshape(len(palettes), len(_CODES))
    scales = found[:, 1 - _LOWEST].unsqueeze(1).contiguous()  # the entry of code 1
    different = _entries(scales).view(torch.int32) != found.contiguous().view(torch.int32)
    if different.any():
        row = int(different.any(1).nonzero()[0])
        raise InputError(name, f"has a palette that is no multiple of a scale (row {row})")
    return QuantizedTensor((indices.to(torch.int8) + _LOWEST).to(torch.int8), scales, scheme)


def _entries(scales: Tensor) -> Tensor:
    """Every code times the scale of a row: float32 [out_features, 16]."""
    return scales.reshape(-1, 1).float() * _CODES
