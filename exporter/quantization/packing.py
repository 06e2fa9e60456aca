"""Packing of integer codes into bytes, in the conventions of the formats.

Formats differ in two things: the offset that is added to a code (none for two's complement, or one
that makes every code non-negative), and which nibble of a byte holds the code of the even column. A
`Packing` describes both. All packing and unpacking of nibbles is in this module.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """How a format packs codes: `offsets` maps the bits of a code to the offset that is added.

    A byte holds two 4-bit codes: that of the even column in the low nibble, or in the high nibble
    with `high_nibble_first`. An 8-bit code is one byte.
    """

    offsets: Mapping[int, int]
    high_nibble_first: bool = False

    def pack(self, codes: Tensor, bits: int) -> Tensor:
        """int8 codes [rows, columns] → uint8 [rows, columns * bits // 8].

        Raises ValueError for bits that the format does not store.
        """
        stored = codes.view(torch.uint8) + self._offset(bits)  # modulo 256
        if bits == 8:
            return stored
        nibbles = stored & 0x0F
        low, high = nibbles[:, 0::2], nibbles[:, 1::2]
        low, high = (high, low) if self.high_nibble_first else (low, high)
        return low | high << 4

    def unpack(self, packed: Tensor, bits: int) -> Tensor:
        """The inverse of `pack`: uint8 [rows, columns * bits // 8] → int8 [rows, columns].

        Raises ValueError for bits that the format does not store.
        """
        offset = self._offset(bits)
        if bits == 8:
            return (packed - offset).view(torch.int8)
        # In place: this is what verifying a large artifact takes most of its time for.
        codes = packed.new_empty(*packed.shape, 2)
        low, high = codes.unbind(-1)
        low, high = (high, low) if self.high_nibble_first else (low, high)
        torch.bitwise_and(packed, 0x0F, out=low)
        torch.bitwise_right_shift(packed, 4, out=high)
        if offset != 8:
            codes.add_(8 - offset).bitwise_and_(0x0F)
        return codes.sub_(8).flatten(1).view(torch.int8)  # from -8..7, modulo 256

    def _offset(self, bits: int) -> int:
        if bits not in self.offsets or bits not in (4, 8):
            known = ", ".join(map(str, self.offsets))
            raise ValueError(f"cannot pack codes of {bits} bits, only of {known}")
        return self.offsets[bits]


#: Codes without an offset: the quantized checkpoint, and ONNX's INT4 and INT8 types.
TWOS_COMPLEMENT = Packing({4: 0, 8: 0})
