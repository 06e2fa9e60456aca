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


def stores_for_neural_engine(name: str, scheme: Scheme, shape: tuple[int, ...]) -> str | None:
    """The reason why a package for the Neural Engine cannot store this weight, or None.

    int4 with one scale a row becomes palettes. int8 with one scale a row stays as it is, since
    it is reported to be right there (apple/coremltools 2716), and a palette of 256 values a row
    would nearly double a matrix of 576 columns.
    """
    if scheme.group_size:
        return "the Neural Engine computes codes in groups wrongly, as apple/coreai-models 279 says"
    return stores(name, scheme, shape)
