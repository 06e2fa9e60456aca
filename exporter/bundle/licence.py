"""The licence that a bundle states: that of the checkpoint, or else that of the recipe."""

from collections.abc import Collection
from typing import Annotated

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression
from pydantic import AfterValidator, Field

from exporter.errors import short
from exporter.model.licence import LICENCE_FILES, LicenceTerms
from exporter.settings import refusal

#: Files that have the text of a licence; the others of `LICENCE_FILES` add to it.
_TEXTS = tuple(name for name in LICENCE_FILES if name.startswith("LICEN"))


def _check_files(files: list[str]) -> list[str]:
    for name in files:
        if name not in LICENCE_FILES:
            raise refusal(f"{short(name)} is not the name of a licence file")
    return files


class Licence(LicenceTerms):
    """The licence of a bundle. `files` are the licence files of the checkpoint, which lie beside
    ``manifest.json``."""

    files: Annotated[list[str], AfterValidator(_check_files)] = Field(default_factory=list)

    def spdx(self) -> str:
        """The SPDX expression of the licence; empty for one that is not in SPDX's list."""
        try:
            known = str(canonicalize_license_expression(self.id))
        except InvalidLicenseExpression:  # the hub has ids of its own
            return ""
        return "" if known.startswith("LicenseRef-") else known


def effective(
    checkpoint: LicenceTerms | None, recipe: LicenceTerms | None, files: Collection[str]
) -> Licence | None:
    """The licence of a bundle, or None if it is not known.

    What the checkpoint states comes before what the recipe states. If neither names a licence, but
    the checkpoint has the text of one among its `files`, it is ``other``, with a link to the text.
    A link to a file that the bundle lacks is left out.
    """
    present = [name for name in LICENCE_FILES if name in files]
    text = next((name for name in present if name in _TEXTS), "")
    terms = checkpoint or recipe
    if terms is None:
        return Licence(id="other", link=text, files=present) if text else None
    is_file = terms.link in LICENCE_FILES
    link = text if is_file and terms.link not in present else terms.link
    return Licence(id=terms.id, name=terms.name, link=link, files=present)
