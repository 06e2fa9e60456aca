"""Integer codes as bytes, in each of the ways that formats keep them.

Formats differ in two things: what they add to a code before they store it (nothing, so that a code
is two's complement, or an offset that makes every code positive), and which nibble of a byte holds
the code of the even column. A `Packing` says both; all packing and unpacking of nibbles is here.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """How a format keeps codes: `offsets` maps bits to what is added to a code of so many bits.

    Codes of 4 bits lie two in a byte, those of even columns in the low nibble, or in the high one
    with `high_nibble_first`. Codes of 8 bits are one byte each.
    """

    offsets: Mapping[int, int]
    high_nibble_first: bool = False

    def pack(self, codes: Tensor, bits: int) -> Tensor:
        """int8 codes [rows, columns] to uint8 [rows, columns * bits // 8].

        Raises ValueError for bits that the format does not keep.
        """
        stored = codes.view(torch.uint8) + self._offset(bits)  # modulo 256
        if bits == 8:
            return stored
        nibbles = stored & 0x0F
        low, high = nibbles[:, 0::2], nibbles[:, 1::2]
        low, high = (high, low) if self.high_nibble_first else (low, high)
        return low | high << 4

    def unpack(self, packed: Tensor, bits: int) -> Tensor:
        """The inverse of `pack`: uint8 [rows, columns * bits // 8] to int8 [rows, columns].

        Raises ValueError for bits that the format does not keep.
        """
        offset = self._offset(bits)
        if bits == 8:
            return (packed - offset).view(torch.int8)
        nibbles = [packed & 0x0F, packed >> 4]
        if self.high_nibble_first:
            nibbles.reverse()
        stored = torch.stack(nibbles, -1).flatten(1) - offset
        # The sign bit of 4 bits moves to that of 8.
        return (stored << 4).view(torch.int8) >> 4

    def _offset(self, bits: int) -> int:
        if bits not in self.offsets or bits not in (4, 8):
            known = ", ".join(map(str, self.offsets))
            raise ValueError(f"codes of {bits} bits cannot be packed here, only of {known}")
        return self.offsets[bits]


#: Codes as they are: those of the quantized checkpoint, and of ONNX's own INT4 and INT8.
TWOS_COMPLEMENT = Packing({4: 0, 8: 0})
