"""Parts of the size prediction that several formats share."""

import math

from exporter.quantization.schemes import FLOAT, Scheme

#: Memory of a runtime besides weights, tables and planned memory, in bytes.
RUNTIME_BYTES = 12_000_000


def stored_bytes(scheme: Scheme, shape: tuple[int, ...]) -> int:
    """Bytes of codes and scales, with bfloat16 scales per group or float32 scales per row."""
    if scheme == FLOAT:
        return 4 * math.prod(shape)
    codes = math.prod(shape) * (scheme.bits or 0) // 8
    scale = 2 if scheme.group_size else 4
    return codes + scale * math.prod(scheme.scale_shape(shape))
