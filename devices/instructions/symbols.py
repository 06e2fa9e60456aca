"""Which function a place in an ELF file belongs to.

binutils reads the files: it comes with the compiler that the runner's build needs, and it demangles
the names of C++, which a Python reader of ELF does not.
"""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from devices.errors import DeviceError
from devices.instructions.tools import SHORT, binutil
from devices.transports.client import run_client

#: A line of ``readelf -SW``: name, address, offset in the file, size; then flags.
_SECTION = re.compile(
    r"\s*\[ *\d+\] (\S+) +PROGBITS +([0-9a-f]+) ([0-9a-f]+) ([0-9a-f]+) [0-9a-f]+ +(\w+)"
)
#: A line of ``nm -S`` for a function: address, size where it is known, type, name.
_SYMBOL = re.compile(r"([0-9a-f]+) (?:([0-9a-f]+) )?[TtWwi] (.+)")
_LONGEST = 2000


@dataclass(frozen=True)
class _Section:
    name: str
    address: int
    offset: int
    size: int


@dataclass(frozen=True, order=True)
class _Symbol:
    address: int
    size: int
    name: str


@dataclass(frozen=True)
class Symbols:
    """The sections of a file that hold code, and its functions in the order of their addresses."""

    sections: Sequence[_Section]
    functions: Sequence[_Symbol]

    def function(self, offset: int) -> tuple[str, bool]:
        """The function of the code at an offset in the file, and whether it is only near.

        A stripped library tells the functions that it exports alone. Code of others is given to
        the nearest of these before it, and is near; code of a section without any, such as
        ``.plt``, to the section.
        """
        for section in self.sections:
            if section.offset <= offset < section.offset + section.size:
                return self._function_in(section, offset - section.offset + section.address)
        return "outside of all sections", True

    def _function_in(self, section: _Section, address: int) -> tuple[str, bool]:
        after = bisect_right(self.functions, address, key=lambda symbol: symbol.address)
        if not after or self.functions[after - 1].address < section.address:
            return section.name, False
        symbol = self.functions[after - 1]
        return symbol.name, address >= symbol.address + symbol.size


def read_symbols(path: Path) -> Symbols:
    """Read the sections and functions of an ELF file for Arm. Raises DeviceError."""
    sections = [
        _Section(name, int(address, 16), int(offset, 16), int(size, 16))
        for name, address, offset, size, flags in _SECTION.findall(
            _said("readelf", "--section-headers", "--wide", str(path))
        )
        if "X" in flags
    ]
    listed = (_said("nm", *options, str(path)) for options in ((), ("--dynamic",)))
    # Of several names for a place, the first one of the longest.
    by_address = dict[int, _Symbol]()
    for symbol in (symbol for text in listed for symbol in _functions(text)):
        known = by_address.get(symbol.address)
        if known is None or (-symbol.size, symbol.name) < (-known.size, known.name):
            by_address[symbol.address] = symbol
    return Symbols(sections, sorted(by_address.values()))


def _functions(text: str) -> Iterator[_Symbol]:
    for line in text.splitlines():
        if found := _SYMBOL.fullmatch(line):
            address, size, name = found.groups()
            yield _Symbol(int(address, 16), int(size or "0", 16), name.split("@")[0][:_LONGEST])


def _said(program: str, *arguments: str) -> str:
    tool = binutil(program)
    if program == "nm":
        arguments = ("--demangle", "--defined-only", "--print-size", *arguments)
    code, said, errors = run_client(tool, [tool, *arguments], SHORT)
    if code:
        raise DeviceError(tool, f"cannot read {arguments[-1]} ({errors.strip()[:200]})")
    return said
