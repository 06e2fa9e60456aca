"""Which schemes a Core ML package stores; needs no toolkit."""

from exporter.backends._storage import wrong_bits
from exporter.quantization.schemes import Scheme

#: Bits of the codes → the type of the program that has them.
CODE_KINDS = {4: "int4", 8: "int8"}


def stores(name: str, scheme: Scheme, shape: tuple[int, ...]) -> str | None:
    """Why a package cannot hold this weight in this scheme, or None: blocks may have any size."""
    return wrong_bits(scheme, CODE_KINDS)
