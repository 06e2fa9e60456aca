"""The schemes that an ONNX model can store, and the size of its blocks. Needs no toolkit."""

from collections.abc import Mapping

from exporter.backends._storage import wrong_bits
from exporter.backends.onnx import Target
from exporter.model.config import EMBEDDING, OUTPUT
from exporter.quantization.packing import Packing
from exporter.quantization.schemes import FLOAT, Scheme

#: Codes of ``MatMulNBits``, and of the embedding that shares them: unsigned, low nibble first.
UNSIGNED = Packing({4: 8, 8: 128})
#: Bits of a code → the name of the constant with the codes of every byte, which the lookup reads.
CODES_OF_BYTES = {4: "codes_of_bytes_4", 8: "codes_of_bytes_8"}
#: The range of block sizes in ONNX Runtime's own operators (the contrib form): powers of two.
SMALLEST_BLOCK, LARGEST_BLOCK = 16, 256


def block_of(scheme: Scheme, columns: int) -> int:
    """How many codes of a row share one scale in the model.

    This is the group size. For one scale per row it is the largest block that divides the row.
    """
    if scheme.group_size:
        return scheme.group_size
    block = LARGEST_BLOCK
    while columns % block:
        block //= 2
    return block


def data_type(schemes: Mapping[str, Scheme], target: Target) -> str:
    """The data type that transformers.js asks for to get these weights: int4 if there are any, else
    int8, else the type of the activations."""
    half, bits = target.activations == "float16", {scheme.bits for scheme in schemes.values()}
    if 4 in bits:
        return "q4f16" if half else "q4"
    if 8 in bits:
        return "int8"
    return "fp16" if half else "fp32"


def stores(name: str, scheme: Scheme, shape: tuple[int, ...], target: Target) -> str | None:
    """The reason why the model cannot store this weight in this scheme, or None."""
    if problem := wrong_bits(scheme, UNSIGNED.offsets):
        return problem
    if scheme.bits == 4 and target.form == "portable" and shape[0] % 2:
        return (
            f"it has {shape[0]} rows, an odd number, and in the portable form two int4 codes of "
            "neighbouring rows share a byte"
        )
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
    """Whether the weight is stored without blocks, for ``DynamicQuantizeMatMul``.

    Embedding and output layer keep their blocks, since a tied embedding is also a lookup table.
    """
    fast = target.form == "contrib" and target.products == "int8"
    return fast and scheme == Scheme(8) and name not in (EMBEDDING, OUTPUT)
