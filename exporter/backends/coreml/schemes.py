"""The schemes that a Core ML package can store. Needs no toolkit."""

from exporter.backends._storage import wrong_bits
from exporter.quantization.schemes import Scheme

#: Bits of the codes → their type in the program.
CODE_KINDS = {4: "int4", 8: "int8"}


def stores(name: str, scheme: Scheme, shape: tuple[int, ...]) -> str | None:
    """The reason why a package cannot store this weight in this scheme, or None.

    Any group size can be stored.
    """
    return wrong_bits(scheme, CODE_KINDS)
