"""Which schemes an ONNX model stores, and in blocks of how many codes; needs no toolkit."""

from exporter.backends._storage import wrong_bits
from exporter.backends.onnx import Target
from exporter.model.config import EMBEDDING, OUTPUT
from exporter.quantization.packing import Packing
from exporter.quantization.schemes import FLOAT, Scheme

#: Codes of ``MatMulNBits`` and ``GatherBlockQuantized``: no negative ones, low nibble first.
UNSIGNED = Packing({4: 8, 8: 128})
#: The blocks that ONNX Runtime's own operators (the contrib form) are made for: powers of two.
SMALLEST_BLOCK, LARGEST_BLOCK = 16, 256


def block_of(scheme: Scheme, columns: int) -> int:
    """How many codes of a row share one scale in the model: a group. A whole row is stored as the
    largest blocks that divide it."""
    if scheme.group_size:
        return scheme.group_size
    block = LARGEST_BLOCK
    while columns % block:
        block //= 2
    return block


def stores(name: str, scheme: Scheme, shape: tuple[int, ...], target: Target) -> str | None:
    """Why the model cannot hold this weight in this scheme, or None."""
    if problem := wrong_bits(scheme, UNSIGNED.offsets):
        return problem
    if scheme == FLOAT or target.form == "portable" or in_whole_rows(name, scheme, target):
        return None
    block = block_of(scheme, shape[1])
    if block < SMALLEST_BLOCK:
        return (
            f"its rows of {shape[1]} codes would be stored in blocks of {block}, and the operators "
            f"of the contrib form read blocks of {SMALLEST_BLOCK} or more"
        )
    return None


def in_whole_rows(name: str, scheme: Scheme, target: Target) -> bool:
    """Whether the weight is stored without blocks, for ``DynamicQuantizeMatMul``. The table of a
    tied embedding is read as it lies, so it keeps its blocks."""
    fast = target.form == "contrib" and target.products == "int8"
    return fast and scheme == Scheme(8) and name not in (EMBEDDING, OUTPUT)
