"""The documents of a bundle, all derived from its manifest and its measurements."""

from collections.abc import Mapping

from exporter.bundle.bill_of_materials import BILL_OF_MATERIALS, bill_of_materials
from exporter.bundle.card import CARD, card
from exporter.bundle.manifest import BundleManifest
from exporter.bundle.provenance import PROVENANCE, provenance
from exporter.bundle.results import Result
from exporter.model.licence import LICENCE_FILES

#: The names of the files beside ``manifest.json`` that a bundle may have.
DOCUMENTS = (CARD, PROVENANCE, BILL_OF_MATERIALS, *LICENCE_FILES)


def documents(manifest: BundleManifest, results: Mapping[str, Result]) -> dict[str, bytes]:
    """Every document of a bundle but its licence files: name → content.

    `manifest` lists the models, the licence files and the measurements. Raises InputError for a
    manifest or a measurement that a document cannot be made from.
    """
    return {
        CARD: card(manifest, results),
        PROVENANCE: provenance(manifest),
        BILL_OF_MATERIALS: bill_of_materials(manifest, results),
    }
