"""Compare the installed packages and programs with those that the tool requires or can use."""

import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement

from devices.instructions.tools import programs

DISTRIBUTION = "mobilellm-exporter"
#: Extras to skip: `all` repeats the others, `dev` is for work on the tool itself.
_SKIPPED = ("all", "dev")


@dataclass(frozen=True)
class Finding:
    """A package, a program or Python. The tool is unusable if a `required` one is not `fine`."""

    subject: str
    found: str
    wanted: str
    fine: bool
    required: bool
    remedy: str


def examine() -> list[Finding]:
    """Examine Python, every distribution in the packaging metadata, and what `count` needs."""
    version = platform.python_version()
    right = (3, 10) <= sys.version_info[:2] <= (3, 13)
    findings = [Finding("python", version, "3.10 to 3.13", right, True, "")]
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        remedy = "pip install -e ."
        return [*findings, Finding(DISTRIBUTION, "not installed", "", False, True, remedy)]
    offered = metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []
    extras = [extra for extra in offered if extra not in _SKIPPED]
    for line in lines:
        requirement = Requirement(line)
        extra = _extra_of(requirement, extras)
        if extra is None or requirement.name == DISTRIBUTION:
            continue
        findings.append(_examine_package(requirement, extra))
    return findings + [_examine_program(*one) for one in programs().items()]


def _extra_of(requirement: Requirement, extras: Sequence[str]) -> str | None:
    """The extra of a requirement, '' for a base requirement, or None for one to skip."""
    if requirement.marker is None:
        return ""
    return next((e for e in extras if requirement.marker.evaluate({"extra": e})), None)


def _examine_package(requirement: Requirement, extra: str) -> Finding:
    wanted = str(requirement.specifier)
    remedy = f"pip install '{DISTRIBUTION}[{extra}]'" if extra else f"pip install {DISTRIBUTION}"
    subject = f"{requirement.name} [{extra}]" if extra else requirement.name
    try:
        found = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Finding(subject, "not installed", wanted, False, not extra, remedy)
    fine = requirement.specifier.contains(found.split("+")[0], prereleases=True)
    return Finding(subject, found, wanted, fine, True, "" if fine else remedy)


def _examine_program(name: str, package: str) -> Finding:
    """A program that devices ``count:CPU`` need, with its package in Debian."""
    path = shutil.which(name)
    remedy = "" if path else f"apt install {package}"
    return Finding(
        f"{name} [profile count:CPU]", path or "not installed", "", path is not None, False, remedy
    )
