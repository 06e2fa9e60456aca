"""The bytes of an archive that may come from anyone, read in order and in bounded memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from exporter.errors import InputError

#: What to do with an archive that is refused.
REMEDY = "Get the archive again, or unpack it with a tool that you trust and give the folder"


@dataclass(frozen=True)
class Member:
    """A file of an archive: its name, its size in bytes, and its content, to be read once and
    before the next member. Reading the content raises InputError if it is damaged."""

    name: str
    size: int
    content: Iterator[bytes]


class Stream:
    """Reads the `size` bytes that `chunks` give, no more and no less. Raises InputError.

    `path` is the archive; `position` is the number of bytes that were read.
    """

    def __init__(self, path: Path, chunks: Iterator[bytes], size: int) -> None:
        self.path, self.size, self.position = path, size, 0
        self._chunks, self._left = chunks, memoryview(b"")

    def read(self, size: int) -> bytes:
        """The next `size` bytes, at once; the caller bounds `size`."""
        return b"".join(self.content(size))

    def content(self, size: int) -> Iterator[bytes]:
        """The next `size` bytes, in pieces."""
        if size > self.size - self.position:
            raise refusal(self.path, "is truncated")
        while size:
            while not self._left:
                chunk = next(self._chunks, None)
                if chunk is None:
                    raise refusal(self.path, "is truncated")
                self._left = memoryview(chunk)
            piece, self._left = self._left[:size], self._left[size:]
            size -= len(piece)
            self.position += len(piece)
            yield piece.tobytes()

    def expect(self, expected: bytes, problem: str, name: str = "") -> None:
        """Read the bytes that must come next, else refuse with `problem`."""
        if self.read(len(expected)) != expected:
            raise refusal(self.path, problem, name)

    def finish(self) -> None:
        """Refuse what follows the last byte that was read."""
        if self._left or any(self._chunks) or self.position != self.size:
            raise refusal(self.path, "has more data after its end")


def refusal(path: Path, problem: str, name: str = "") -> InputError:
    """The error for an archive, or for the member `name` of it."""
    return InputError(f"{path}: {name}" if name else path, problem, REMEDY)
