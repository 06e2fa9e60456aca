"""Markdown and YAML for documents that hold foreign text.

A name or a value may come from a hostile checkpoint or measurement. It is shown as code, where
Markdown has no markup, no link and no HTML, and as a quoted string in front matter.
"""

import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence

#: The longest foreign text in a document, in characters.
_LONGEST = 200


def plain(value: object) -> str:
    """A foreign value in one line of at most 200 printable characters."""
    text = str(value)
    text = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
    return "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in text)


def code(value: object) -> str:
    """A foreign value as a code span; also in a cell of a table."""
    text = plain(value)
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    padding = " " if longest or text != text.strip() or not text else ""
    return f"{fence}{padding}{text}{padding}{fence}".replace("|", "\\|")


def shell_word(value: object) -> str:
    """A foreign value as one word of a shell command."""
    return shlex.quote(plain(value))


def shell(*lines: str) -> str:
    """A block of shell commands. A foreign word is one line and quoted, so it ends no block."""
    return "\n".join(("```sh", *lines, "```"))


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the cells are Markdown of one line."""
    marks = ["---"] * len(columns)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, marks, *rows))


def number(value: object, digits: int = 0) -> str:
    """A number with thousands separators, or a dash for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        return "–"
    return f"{value:,.{digits}f}" if abs(value) < 1e15 else f"{value:.3g}"


def megabytes(size: int) -> str:
    """A size in MB, such as ``1.34 MB``."""
    return f"{size / 1e6:,.2f} MB"


def front_matter(values: Mapping[str, object]) -> str:
    """YAML between two lines of dashes. Texts are JSON strings, which YAML reads as they are.

    The bytes depend on no library, so that any version derives them again.
    """
    return "\n".join(("---", *_lines(values), "---"))


def _lines(value: object, indent: str = "") -> Iterator[str]:
    """The lines of a mapping or a list in YAML."""
    items = value.items() if isinstance(value, Mapping) else ((None, one) for one in value)  # type: ignore[attr-defined]
    for key, one in items:
        start = f"{indent}- " if key is None else f"{indent}{key}:"
        if not isinstance(one, Mapping | list):
            yield f"{start.rstrip()} {_scalar(one)}"
        elif key is None:
            first, *rest = _lines(one, f"{indent}  ")
            yield f"{start}{first.lstrip()}"
            yield from rest
        else:
            yield start
            yield from _lines(one, f"{indent}  " if isinstance(one, Mapping) else indent)


def _scalar(value: object) -> str:
    if isinstance(value, str):
        return json.dumps(plain(value), ensure_ascii=False)
    text = json.dumps(value)
    # PyYAML takes 1e-07 for a text, and 1.0e-07 for a number.
    return text.replace("e", ".0e") if isinstance(value, float) and "." not in text else text
