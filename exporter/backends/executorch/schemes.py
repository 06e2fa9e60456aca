"""Which schemes a .pte stores, and how their codes lie in it; needs no toolkit."""

from exporter.backends._storage import wrong_bits
from exporter.model.config import ModelConfig
from exporter.quantization.packing import Packing
from exporter.quantization.schemes import Scheme

#: What XNNPACK multiplies by: int4 plus 8, low nibble first; int8 as it is.
FILTER = Packing({4: 8, 8: 0})
#: What ExecuTorch's embedding operators read: int4 plus 8, high nibble first; int8 as it is.
TABLE = Packing({4: 8, 8: 0}, high_nibble_first=True)


def stores(name: str, scheme: Scheme, shape: tuple[int, ...], config: ModelConfig) -> str | None:
    """Why a program for XNNPACK cannot hold this weight in this scheme, or None."""
    multiplied = config.is_multiplied(name)
    if multiplied and scheme.bits == 8 and scheme.group_size:
        return "XNNPACK multiplies int8 weights with one scale a row only"
    return wrong_bits(scheme, FILTER.offsets if multiplied else TABLE.offsets)
