"""The documents of a bundle, all derived from its manifest and its measurements."""

from collections.abc import Mapping

from exporter.bundle.card import CARD, card
from exporter.bundle.manifest import BundleManifest
from exporter.bundle.results import Result
from exporter.model.licence import LICENCE_FILES

#: The names of the files beside ``manifest.json`` that a bundle may have.
DOCUMENTS: tuple[str, ...] = (*LICENCE_FILES, CARD)


def documents(manifest: BundleManifest, results: Mapping[str, Result]) -> dict[str, bytes]:
    """Every document of a bundle: name → content. `manifest` does not list them."""
    return {CARD: card(manifest, results)}
