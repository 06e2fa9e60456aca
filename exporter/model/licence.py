"""The licence of a checkpoint, as its folder states it.

The front matter of ``README.md`` names the licence with the keys of the hub's model cards, and
licence files have its text.
"""

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator

from exporter.errors import InputError, short
from exporter.foreign import open_regular, present
from exporter.settings import Section, refusal
from exporter.yaml_reader import YAML_BYTES, parse_yaml

#: Files with the text of a licence, or with notices and policies that belong to it.
LICENCE_FILES = (
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "LICENCE",
    "LICENCE.txt",
    "LICENCE.md",
    "NOTICE",
    "NOTICE.txt",
    "NOTICE.md",
    "USE_POLICY.md",
)
CARD = "README.md"
_FENCE = b"---"

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,63}")
_URL = re.compile(r"https?://[A-Za-z0-9][!#$%&*+,./0-9:;=?@A-Z_a-z~-]{0,500}")
_LONGEST_NAME = 200


def _is_name(text: str) -> bool:
    return text.isprintable() and len(text) <= _LONGEST_NAME


def _is_link(text: str) -> bool:
    return not text or text in LICENCE_FILES or bool(_URL.fullmatch(text))


def _id(text: str) -> str:
    if not _ID.fullmatch(text):
        raise refusal(
            f"{short(text)} is not an id of a licence",
            "Give the hub's id, such as apache-2.0; for a licence without one: other, and its name",
        )
    return text


def _name(text: str) -> str:
    if not _is_name(text):
        raise refusal(f"{short(text)} is not one line of at most {_LONGEST_NAME} characters")
    return text


def _link(text: str) -> str:
    if not _is_link(text):
        raise refusal(
            f"{short(text)} is neither a web address nor a licence file",
            f"Give an address that begins with https://, or one of {', '.join(LICENCE_FILES)}",
        )
    return text


class LicenceTerms(Section):
    """What a licence is called and where it can be read.

    The fields are `license`, `license_name` and `license_link` of the hub's front matter. `id` is
    an id of the hub, or ``other``, which needs a name.
    """

    id: Annotated[str, AfterValidator(_id)]
    name: Annotated[str, AfterValidator(_name)] = ""
    link: Annotated[str, AfterValidator(_link)] = ""


def read_licence(folder: Path) -> LicenceTerms | None:
    """The licence that the front matter of the folder's ``README.md`` names.

    None if there is no such file, or if it names no licence in a form that the hub knows. Nobody
    runs a model card, so a damaged or hostile one is no reason to refuse the model: it counts as
    one that names no licence. A name or a link of another form is left out.
    """
    try:
        front = _front_matter(folder / CARD)
    except InputError:
        return None
    found = front.get("license")
    if not isinstance(found, str) or not _ID.fullmatch(found):
        return None
    name, link = front.get("license_name"), front.get("license_link")
    return LicenceTerms(
        id=found,
        name=name if isinstance(name, str) and _is_name(name) else "",
        link=link if isinstance(link, str) and _is_link(link) else "",
    )


def _front_matter(path: Path) -> dict[Any, Any]:
    """The front matter of a model card: YAML between two lines of ``---`` at the beginning. Raises
    InputError for one that cannot be read."""
    if not present(path):
        return {}
    with open_regular(path) as file:
        lines = file.read(YAML_BYTES).removeprefix(b"\xef\xbb\xbf").split(b"\n")
    fences = [number for number, line in enumerate(lines) if line.rstrip() == _FENCE]
    if len(fences) < 2 or fences[0] != 0:
        return {}
    content = parse_yaml(b"\n".join(lines[1 : fences[1]]), path, "Correct the front matter")
    return content if isinstance(content, dict) else {}
