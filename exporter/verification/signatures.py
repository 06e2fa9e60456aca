"""Checks of who signed a bundle; see `exporter.bundle.signature`."""

from collections.abc import Mapping
from pathlib import Path

from exporter.bundle.signature import identity_findings, key_findings
from exporter.verification.checks import Check


def check_signature(path: Path, public_key: Path) -> list[Check]:
    """Whether the owner of the key signed exactly the files of the bundle; one check for each
    signature and for each file that contradicts it. Raises InputError for an unusable key."""
    return _checks(key_findings(path, public_key))


def check_identity(path: Path, identity: str, issuer: str) -> list[Check]:
    """`check_signature` for a keyless signature of this identity, which the issuer confirmed.
    Raises InputError without the network."""
    return _checks(identity_findings(path, identity, issuer))


def _checks(findings: Mapping[str, str]) -> list[Check]:
    return [
        Check("signature", None, name, not problem, bool(problem), 0, problem)
        for name, problem in findings.items()
    ]
