"""The bundles of a report, as they are read from disk."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.bundle.archive import opened
from exporter.bundle.bundle import SIGNATURES, file_problems, open_bundle, read_checksums
from exporter.bundle.manifest import (
    IDENTITY,
    MANIFEST,
    BundleManifest,
    FileEntry,
    bundle_manifest,
)
from exporter.bundle.results import (
    EVALUATION,
    PROFILE,
    RESULTS,
    Result,
    check_belongs,
    read_result,
)
from exporter.errors import InputError
from exporter.report.plots import Style

#: A page with more bundles than letters is no longer read.
MOST = 26


@dataclass(frozen=True)
class Subject:
    """A bundle of the report: its manifest, its measurements, and what lies in its folder.

    `results` has the measurements by name, and `signatures` the names of the signature files.
    `letter` tells the bundles of a report apart; it is '' where there is one only. `first` is the
    number of its first style: every target has one, after that of the quantized checkpoint.
    """

    letter: str
    first: int
    manifest: BundleManifest
    results: Mapping[str, Result]
    signatures: Sequence[str]

    @property
    def name(self) -> str:
        """The name of the recipe."""
        return str(self.manifest.recipe.get("name", ""))

    @property
    def title(self) -> str:
        """The letter, if there is one, and the name."""
        return f"{self.letter}: {self.name}" if self.letter else self.name

    def case(self, target: str | None) -> str:
        """The label of one target, or of the quantized checkpoint (None), in plots and tables."""
        named = target or "quantized checkpoint"
        return f"{self.letter} {named}" if self.letter else named

    def style(self, target: str | None) -> Style:
        """The look of one target, or of the quantized checkpoint, in plots."""
        targets = self.manifest.targets
        return Style(self.first + (1 + targets.index(target) if target in targets else 0))

    def measured(self, kind: str) -> list[Mapping[str, Any]]:
        """The content of every measurement of one kind."""
        return [result.content for result in self.results.values() if result.kind == kind]

    def evaluations(self) -> list[Mapping[str, Any]]:
        """What `mobilellm evaluate` measured."""
        return self.measured(EVALUATION)

    def sessions(self) -> list[Mapping[str, Any]]:
        """Every session of `mobilellm profile`, each with the `settings` of its report."""
        return [
            {**session, "settings": content["settings"]}
            for content in self.measured(PROFILE)
            for session in content["sessions"]
        ]

    def counts(self) -> list[Mapping[str, Any]]:
        """What was counted on devices ``count:CPU``."""
        return [counts for result in self.results.values() for counts in result.counts()]


def read_subjects(bundles: Sequence[Path], results: Sequence[Path] = ()) -> list[Subject]:
    """Read bundles, each a folder or an archive, and check the hash of every file.

    A measurement in `results` goes to the bundles whose files it measured. Raises InputError for a
    damaged bundle, and for a measurement of none of them.
    """
    if len(bundles) > MOST:
        raise InputError(f"{len(bundles)} bundles", f"are more than {MOST}", "Give fewer")
    given, placed = {path: read_result(path) for path in results}, set[Path]()
    subjects = list[Subject]()
    for number, path in enumerate(bundles):
        letter = chr(ord("A") + number) if len(bundles) > 1 else ""
        with opened(path) as folder:
            manifest, found = _checked(folder, path)
            signatures = [name for name in SIGNATURES if (folder / name).is_file()]
        for name, result in given.items():
            if _belongs(result, manifest):
                placed.add(name)
                if result not in found.values():
                    found[f"{len(found)}: {name.name}"] = result
        first = sum(len(subject.manifest.targets) + 1 for subject in subjects)
        subjects.append(Subject(letter, first, manifest, found, signatures))
    for path in given:
        if path not in placed:
            problem = "measured files that none of the bundles holds"
            raise InputError(path, problem, "Measure these bundles")
    return subjects


def _checked(folder: Path, path: Path) -> tuple[BundleManifest, dict[str, Result]]:
    """The manifest and the measurements of a bundle, once every file has the hash of its list and
    the manifest is that of the files. Raises InputError."""
    bundle, remedy = open_bundle(folder), f"mobilellm verify {path} says what is wrong"
    for name, problem in file_problems(folder).items():
        raise InputError(f"{path}: {name}", problem, remedy)
    manifest = bundle.manifest
    files = {
        name: FileEntry(sha256=digest, bytes=(folder / name).stat().st_size)
        for name, digest in read_checksums(folder).items()
        if name != MANIFEST
    }
    identity = manifest.model_dump(mode="json", include=set(IDENTITY))
    if bundle_manifest(identity, bundle.quantized, files) != manifest:
        raise InputError(f"{path}: {MANIFEST}", "is not that of the files beside it", remedy)
    results = dict[str, Result]()
    for name in sorted(manifest.files):
        if name.startswith(f"{RESULTS}/"):
            result = read_result(folder / name)
            check_belongs(result, manifest, f"{path}: {name}")
            results[name] = result
    return manifest, results


def _belongs(result: Result, manifest: BundleManifest) -> bool:
    try:
        check_belongs(result, manifest, "")
    except InputError:
        return False
    return True
