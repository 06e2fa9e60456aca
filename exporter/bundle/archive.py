"""A bundle as one file: a reproducible archive, and an archive that is unpacked safely."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from exporter.progress import OnStep, no_step

FORMATS = (".tar.zst", ".zip")


def pack(folder: Path, out: Path, names: Sequence[str], on_step: OnStep = no_step) -> None:
    """Write the named files of a folder as one archive."""
    raise NotImplementedError


@contextmanager
def opened(path: Path, on_step: OnStep = no_step) -> Iterator[Path]:
    """The folder of a bundle; an archive is unpacked into a temporary one."""
    yield path
