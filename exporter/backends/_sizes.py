"""What several predictions of size share."""

import math

from exporter.quantization.schemes import FLOAT, Scheme

#: What a runtime takes beside weights, tables and planned memory.
RUNTIME_BYTES = 12_000_000


def stored_bytes(scheme: Scheme, shape: tuple[int, ...]) -> int:
    """A weight as it is multiplied: group scales are bfloat16, scales of a row float32."""
    if scheme == FLOAT:
        return 4 * math.prod(shape)
    codes = math.prod(shape) * (scheme.bits or 0) // 8
    scale = 2 if scheme.group_size else 4
    return codes + scale * math.prod(scheme.scale_shape(shape))
