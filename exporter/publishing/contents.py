"""What is published: a whole and known bundle, with a licence."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from exporter.bundle.bundle import (
    CHECKSUMS,
    SIGNATURES,
    file_problems,
    open_bundle,
    read_checksums,
)
from exporter.bundle.licence import Licence
from exporter.bundle.manifest import BundleManifest
from exporter.errors import InputError
from exporter.files import sha256


@dataclass(frozen=True)
class Contents:
    """A bundle on disk; `hashes` has the SHA-256 of each of its files."""

    folder: Path
    manifest: BundleManifest
    licence: Licence
    hashes: Mapping[str, str]

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each file in bytes."""
        return {name: (self.folder / name).stat().st_size for name in self.hashes}


def contents(folder: Path, path: Path) -> Contents:
    """The files of a bundle in `folder`, which the user gave as `path`.

    Raises InputError if a file is damaged or does not belong to the bundle, and if its licence is
    not known.
    """
    bundle = open_bundle(folder)
    for name, problem in file_problems(folder).items():
        raise InputError(f"{path}: {name}", problem, "The bundle is damaged: export it again")
    licence = bundle.manifest.licence
    if licence is None:
        raise InputError(
            path,
            "has no known licence, so that nobody may know whether it can be passed on",
            "Find the licence of the checkpoint, name it in the recipe (license.id=apache-2.0), "
            "and export again",
        )
    beside = [name for name in (CHECKSUMS, *SIGNATURES) if (folder / name).is_file()]
    hashes = read_checksums(folder) | {name: sha256(folder / name) for name in beside}
    return Contents(folder, bundle.manifest, licence, dict(sorted(hashes.items())))
