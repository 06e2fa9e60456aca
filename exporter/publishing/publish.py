"""Publish a bundle, or say what would be published."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from exporter.bundle.archive import opened
from exporter.errors import InputError
from exporter.progress import Progress
from exporter.publishing import folder, hub, registry
from exporter.publishing.contents import Contents, contents

#: Writes a bundle and returns the name by which the destination knows it: a path, a digest, the
#: address of a commit.
Writer = Callable[[Contents, bool, Progress], str]

_DESTINATIONS = "Give a folder, oci://HOST:PORT/NAME:TAG or hub:OWNER/NAME"


@dataclass(frozen=True)
class Published:
    """What was published, or would be: `files` maps name → bytes.

    `reference` is the name by which the destination knows it; it is empty in a dry run.
    """

    destination: str
    files: Mapping[str, int]
    licence: str
    reference: str


def publish(
    path: Path, destination: str, yes: bool, progress: Progress, overwrite: bool = False
) -> Published:
    """Publish a bundle, which is a folder or an archive.

    Without `yes`, everything that needs no network is checked, and nothing is written. Another
    bundle at the destination is replaced only with `overwrite`; anything else there is never
    replaced. Raises InputError.
    """
    write = _writer(destination, path)
    with opened(path) as source:
        found = contents(source, path)
        reference = write(found, overwrite, progress) if yes else ""
        licence = found.licence
        return Published(destination, found.sizes, licence.name or licence.id, reference)


def _writer(destination: str, source: Path) -> Writer:
    """The function that writes to the destination. Raises InputError for what names none."""
    kind, separator, rest = destination.partition(":")
    if kind == "oci" and separator:
        return partial(registry.write, registry.parse_reference(rest, destination))
    if kind == "hub" and separator:
        return partial(hub.write, hub.parse_repository(rest, destination))
    if separator and not destination.startswith((".", "/")):
        raise InputError(destination, f"{kind!r} is no kind of destination", _DESTINATIONS)
    return partial(folder.write, folder.check_destination(Path(destination), source))
