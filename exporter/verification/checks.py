"""The findings of a verification, and those about files and about the quantized checkpoint itself.

A check does not raise: each function returns a list of findings with the place, the value and its
limit.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from exporter.bundle.bundle import (
    CHECKSUMS,
    SIGNATURES,
    file_problems,
    is_bundle,
    open_bundle,
    read_checksums,
    tree,
)
from exporter.bundle.manifest import MANIFEST, read_manifest
from exporter.bundle.signature import Signer
from exporter.errors import InputError
from exporter.files import differing_files, sha256
from exporter.foreign import FILE_BYTES, inside, present
from exporter.quantization.quantized_checkpoint import MANIFEST as QUANTIZED_MANIFEST
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint, damaged_tensors

#: The most digits of a hash in ``SHA256SUMS`` that are taken for damage to the list.
_DAMAGED_DIGITS = 2


@dataclass(frozen=True)
class Check:
    """One finding; a `limit` of None means that the value is reported only, and a `value` of None
    that nothing was measured."""

    check: str
    target: str | None
    subject: str
    passed: bool
    value: float | None
    limit: float | None
    note: str = ""


def failures(checks: Sequence[Check]) -> Iterator[Check]:
    """The checks that did not pass."""
    return (check for check in checks if not check.passed)


def check_quantized_files(quantized: QuantizedCheckpoint) -> list[Check]:
    """The hash of every file of a quantized checkpoint; one check per file. A file that the
    manifest does not list fails."""
    hashes = quantized.manifest["files"]
    files, foreign = tree(quantized.path)
    unlisted = files - hashes.keys() - {QUANTIZED_MANIFEST}
    problems = differing_files(quantized.path, hashes) | foreign
    problems |= dict.fromkeys(sorted(unlisted), f"is not listed in {QUANTIZED_MANIFEST}")
    return _file_checks(hashes, problems)


def check_bundle_files(path: Path) -> list[Check]:
    """The hash of every file of a bundle; one check per file. Raises InputError if the folder is
    not a finished bundle."""
    if not is_bundle(path):
        open_bundle(path)  # raises with the reason
    try:
        hashes, problems = read_checksums(path), file_problems(path)
    except InputError as error:  # SHA256SUMS itself is damaged
        return [Check("files", None, CHECKSUMS, False, 1, 0, error.problem)]
    wrong = _wrong_lines(path, hashes, problems)
    if not wrong:
        return _file_checks(hashes, problems)
    problems = {name: problem for name, problem in problems.items() if name not in wrong}
    problems[CHECKSUMS] = f"differs from the files and from {MANIFEST} for {', '.join(wrong)}"
    return _file_checks([name for name in hashes if name not in wrong], problems)


def _wrong_lines(path: Path, hashes: Mapping[str, str], problems: Mapping[str, str]) -> list[str]:
    """The names in `problems` whose line in ``SHA256SUMS`` is wrong, and not the file: the file has
    the hash that ``manifest.json`` has for it, or is neither there nor in the manifest."""
    found = {name: _hash_in(path, name) for name in problems}
    if MANIFEST in problems:
        listed, actual = hashes.get(MANIFEST), found[MANIFEST]
        # A changed file has quite another hash; one that differs in a digit or two is damaged.
        if not actual or (listed and sum(map(str.__ne__, listed, actual)) > _DAMAGED_DIGITS):
            return []
    try:
        expected = {name: entry.sha256 for name, entry in read_manifest(path).files.items()}
    except InputError:
        return []

    def is_wrong(name: str) -> bool:
        if name in expected:
            return expected[name] == found[name]
        return name == MANIFEST or (name in hashes and not os.path.lexists(path / name))

    return [name for name in problems if is_wrong(name)]


def _hash_in(path: Path, name: str) -> str | None:
    """The hash of a file of a bundle, None if it is missing or may not be read."""
    try:
        file = inside(path, name, links=False)
        return sha256(file) if present(file, FILE_BYTES) else None
    except InputError:
        return None


def check_signature(path: Path, signer: Signer | None) -> list[Check]:
    """Whether the signer signed the files of this bundle; one check per signature and per file that
    contradicts it. Without a signer, one check that has no limit tells whether there is a
    signature. Raises InputError for a key that cannot be used."""
    if signer is not None:
        found = signer.findings(path)
        return [
            Check("signature", None, name, not problem, bool(problem), 0, problem)
            for name, problem in found.items()
        ]
    signed = [name for name in SIGNATURES if (path / name).is_file()]
    note = "is not checked: --key gives the public key of the signer"
    return [Check("signature", None, name, True, 0, None, note) for name in signed]


def _file_checks(names: Iterable[str], problems: Mapping[str, str]) -> list[Check]:
    return [
        Check(
            "files", None, name, name not in problems, name in problems, 0, problems.get(name, "")
        )
        for name in dict.fromkeys((*names, *problems))
    ]


def check_quantized(quantized: QuantizedCheckpoint) -> list[Check]:
    """Codes in range, scales on the portable grid, floats finite; one check per tensor."""
    problems = damaged_tensors(quantized)
    return [
        Check("quantized", None, name, name not in problems, 0.0, None, problems.get(name, ""))
        for name in quantized.schemes
    ]
