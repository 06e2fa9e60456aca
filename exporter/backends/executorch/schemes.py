"""The schemes that a .pte can store, and the packing of their codes. Needs no toolkit."""

from exporter.backends._storage import wrong_bits
from exporter.model.config import ModelConfig
from exporter.quantization.packing import Packing
from exporter.quantization.schemes import Scheme

#: XNNPACK's filters: int4 codes plus 8, low nibble first; int8 codes unchanged.
FILTER = Packing({4: 8, 8: 0})
#: Tables of ExecuTorch's embedding operators: int4 plus 8, high nibble first; int8 unchanged.
TABLE = Packing({4: 8, 8: 0}, high_nibble_first=True)


def stores(name: str, scheme: Scheme, shape: tuple[int, ...], config: ModelConfig) -> str | None:
    """The reason why a program for XNNPACK cannot store this weight in this scheme, or None."""
    multiplied = config.is_multiplied(name)
    if multiplied and scheme.bits == 8 and scheme.group_size:
        return "XNNPACK multiplies int8 weights with one scale per row only"
    return wrong_bits(scheme, FILTER.offsets if multiplied else TABLE.offsets)
