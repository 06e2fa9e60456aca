"""The schemes that a GGUF file can store. Needs no toolkit."""

from exporter.backends._storage import wrong_bits
from exporter.quantization.schemes import FLOAT, Scheme

#: Codes in a block; one scale each.
BLOCK = 32
#: Bits of a code → the type of blocks in GGUF and the bytes of one: a float16 scale, then codes.
BLOCK_TYPES = {4: ("Q4_0", 2 + BLOCK // 2), 8: ("Q8_0", 2 + BLOCK)}


def stores(name: str, scheme: Scheme, shape: tuple[int, ...]) -> str | None:
    """The reason why the file cannot store this weight in this scheme, or None.

    A scale of a wider group, or of a whole row, is repeated for each block.
    """
    if problem := wrong_bits(scheme, BLOCK_TYPES):
        return problem
    if scheme != FLOAT and shape[1] % BLOCK:
        return f"its rows of {shape[1]} codes are not whole blocks of {BLOCK}, as GGUF stores them"
    return None
