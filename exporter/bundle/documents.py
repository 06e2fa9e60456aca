"""The documents of a bundle, all derived from its manifest and its measurements."""

from collections.abc import Mapping

from exporter.bundle.bill_of_materials import BILL_OF_MATERIALS, bill_of_materials
from exporter.bundle.manifest import BundleManifest
from exporter.bundle.provenance import PROVENANCE, provenance
from exporter.bundle.results import Result
from exporter.model.licence import LICENCE_FILES

#: The names of the files beside ``manifest.json`` that a bundle may have.
DOCUMENTS: tuple[str, ...] = (*LICENCE_FILES, PROVENANCE, BILL_OF_MATERIALS)


def documents(manifest: BundleManifest, results: Mapping[str, Result]) -> dict[str, bytes]:
    """Every document of a bundle: name → content. `manifest` does not list them."""
    return {
        PROVENANCE: provenance(manifest),
        BILL_OF_MATERIALS: bill_of_materials(manifest, results),
    }
