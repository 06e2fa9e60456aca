"""What a bundle was made from, as the provenance and the bill of materials name it.

Packages and models have package URLs (https://github.com/package-url/purl-spec), one name in all
tools. The library for them is not used: `verify` compares documents byte for byte, so another
version of a library must not change the text.
"""

import re
from typing import Annotated, Any
from urllib.parse import quote

from pydantic import Field

from exporter.bundle.manifest import BundleManifest
from exporter.settings import FileHashes, Section, Sha256, list_of, parse_section

#: This tool, among the versions of packages.
TOOL = "mobilellm-exporter"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_SAFE = ".-_~"


class Text(Section):
    """A text of the calibration: its name, hash, and weight in the mixture."""

    source: str
    sha256: Sha256
    weight: float


class Calibration(Section):
    """What a calibration read and found, of the manifest's `calibration`: its texts, the files of
    another teacher, and what decides the integers without being in the recipe."""

    text: Annotated[tuple[Text, ...], list_of("texts")] = ()
    teacher: FileHashes = Field(default_factory=dict)
    precision: str | None = None
    processes: int | None = None
    wider: Annotated[tuple[str, ...], list_of("weights")] = ()


def calibration_of(manifest: BundleManifest) -> Calibration:
    """The calibration of a bundle; an empty one if it was not calibrated. Raises InputError for
    fields of the wrong type."""
    recorded = manifest.calibration or {}
    known: dict[str, Any] = {k: v for k, v in recorded.items() if k in Calibration.model_fields}
    return parse_section(Calibration, known, "calibration", remedy="Export the bundle again")


def python_package(name: str, version: str = "") -> str:
    """The URL of a package of PyPI: ``pkg:pypi/torch@2.13.0``."""
    normal = quote(name.lower().replace("_", "-"), safe=_SAFE)
    return f"pkg:pypi/{normal}" + (f"@{quote(version, safe=_SAFE)}" if version else "")


def is_hub_id(model: object) -> bool:
    """Whether the text names a model of the hub, ``OWNER/NAME``: no pattern, and no folder, which
    begins with ``./``."""
    return isinstance(model, str) and bool(_HUB_ID.fullmatch(model))


def hub_model(manifest: BundleManifest, file: str = "") -> str:
    """The URL of the checkpoint on the Hugging Face hub, or of a file of it:
    ``pkg:huggingface/facebook/MobileLLM-R1-140M#config.json``.

    It is the name that the recipe gives to the checkpoint; empty where it gives a folder or a
    pattern. Whether the checkpoint is the published one, only its hashes show.
    """
    model = manifest.recipe.get("model")
    if not is_hub_id(model):
        return ""
    return f"pkg:huggingface/{model}" + (f"#{quote(file, safe=_SAFE + '/')}" if file else "")
