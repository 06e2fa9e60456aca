"""Write a report to files.

mobilellm report nano.tar.zst -o report.html --markdown report.md
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from exporter.errors import InputError
from exporter.files import replacing
from exporter.report.markdown import tables
from exporter.report.page import page
from exporter.report.subjects import read_subjects


@dataclass(frozen=True)
class Written:
    """The page, its size in bytes, the Markdown file if there is one, and the bundles."""

    page: Path
    bytes: int
    markdown: Path | None
    bundles: Sequence[str]


def write_report(
    bundles: Sequence[Path], out: Path, markdown: Path | None = None, results: Sequence[Path] = ()
) -> Written:
    """Write the report on these bundles, with the measurements in them and those in `results`.

    Earlier files at `out` and `markdown` are replaced, but nothing that is read or that lies in a
    bundle. Raises InputError.
    """
    outputs = [out, *([] if markdown is None else [markdown])]
    for path in outputs:
        _check_output(path, [*bundles, *results])
    if markdown is not None and markdown.absolute() == out.absolute():
        raise InputError(markdown, "is the name of the page too", "Give two names")
    subjects = read_subjects(bundles, results)
    content = page(subjects).encode()
    texts = {out: content}
    if markdown is not None:
        texts[markdown] = tables(subjects).encode()
    for path, text in texts.items():
        with replacing(path) as file:
            file.write(text)
    return Written(out, len(content), markdown, [subject.title for subject in subjects])


def _check_output(path: Path, inputs: Sequence[Path]) -> None:
    """Raise InputError for a file that cannot be written, or that must not be replaced."""
    if path.is_dir():
        raise InputError(path, "is a folder", "Give the name of a file")
    place = path.parent.resolve() / path.name  # a link is replaced, not followed
    for given in inputs:
        if place.is_relative_to(given.resolve()):
            raise InputError(path, f"lies in what is read ({given})", "Give another name")
