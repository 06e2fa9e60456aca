"""How an ONNX model differs from another, by structure and by content.

Compared are inputs, outputs and value infos, every node with its attributes and inner graphs, the
imported operator sets, functions, metadata, and every initializer by its values, wherever these are
stored. Left out is what has no effect: the places of tensors in the data file, the order of
initializers, attributes, metadata and operator sets, and ``producer_version``.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onnx import GraphProto

from exporter.backends import _comparison
from exporter.backends.onnx import GENAI_CONFIG, OPERATORS_NAME, ORT_NAME, ort
from exporter.backends.onnx.contents import Contents, open_contents
from exporter.errors import InputError
from exporter.files import read_json

#: Entries that record a version and have no effect.
_VERSIONS = ("producer_version",)


def differences(found: Path, expected: Path, files: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """How the files in the folder `found` differ from those in `expected`. Raises InputError."""
    contents = [open_contents(folder) for folder in (found, expected)]
    yield from _comparison.differences(*(_model(one) for one in contents))
    yield from _unused(contents[0].model.graph)
    for name, read in _COMPANIONS.items():
        if name in files:
            one, other = (read(folder / name) for folder in (found, expected))
            yield from ((f"{name}: {at}", what) for at, what in _comparison.differences(one, other))


def _model(contents: Contents) -> dict[str, Any]:
    plain = contents.plain(contents.model)
    return {name: value for name, value in plain.items() if name not in _VERSIONS}


def _unused(graph: GraphProto) -> Iterator[tuple[str, str]]:
    """Initializers that no node reads."""
    read = set(reads(graph))
    for tensor in graph.initializer:
        if tensor.name not in read:
            yield f"graph.initializer.{tensor.name}", "is read by no node"


def reads(graph: GraphProto) -> Iterator[str]:
    """The names of the values that the nodes and the outputs of a graph read."""
    yield from (output.name for output in graph.output)
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from reads(inner)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_bytes().decode("utf-8", "backslashreplace").splitlines()
    except OSError as error:
        raise InputError(path, f"cannot be read ({error})", "Get the file again") from error


_COMPANIONS = {GENAI_CONFIG: read_json, OPERATORS_NAME: _lines, ORT_NAME: ort.read}
