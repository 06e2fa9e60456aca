"""The documents of a bundle, all derived from its manifest and its measurements."""

from collections.abc import Mapping

from exporter.bundle.manifest import BundleManifest
from exporter.bundle.results import Result

#: Every document that a bundle may have.
DOCUMENTS: tuple[str, ...] = ()


def documents(manifest: BundleManifest, results: Mapping[str, Result]) -> dict[str, bytes]:
    """Every document of a bundle: name → content. `manifest` does not list them."""
    return {}
