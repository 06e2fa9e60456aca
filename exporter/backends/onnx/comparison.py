"""How an ONNX model differs from another, by structure and by content.

Compared are inputs, outputs and value infos, every node with its attributes and inner graphs, the
imported operator sets, functions, metadata, and every initializer by its values, wherever these are
stored. Left out is what has no effect: the places of tensors in the data file, the order of
initializers, attributes, metadata and operator sets, and ``producer_version``.
"""

import filecmp
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from onnx import GraphProto

from exporter.backends import _comparison
from exporter.backends.onnx import OPERATORS, ORT, main_file, ort
from exporter.backends.onnx.contents import Contents, open_contents
from exporter.errors import InputError
from exporter.foreign import present, read_bytes, read_json

#: Entries that record a version and have no effect.
_VERSIONS = ("producer_version",)
#: The most bytes of a list of operators.
_LONGEST = 1 << 20


def differences(found: Path, expected: Path, files: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """How the files in the folder `found` differ from those in `expected`, whose `files` were
    written by `lower`. Raises InputError."""
    graph = main_file(files)
    contents = open_contents(found / graph)
    yield from _comparison.differences(_model(contents), _model(open_contents(expected / graph)))
    yield from _unused(contents.model.graph)
    for end, read in _COMPANIONS.items():
        for name in files:
            if name.endswith(end) and not _equal(found / name, expected / name):
                yield from _comparison.differences(read(found / name), read(expected / name), name)


def _equal(one: Path, other: Path) -> bool:
    """Whether the files have the same bytes; False if one of them cannot be read."""
    try:
        return filecmp.cmp(one, other, shallow=False)
    except OSError:
        return False


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
    if not present(path, _LONGEST):
        raise InputError(path, "no such file", "Give the whole folder that it belongs to")
    return read_bytes(path, _LONGEST).decode("utf-8", "backslashreplace").splitlines()


#: The end of a companion's name, and how it is read.
_COMPANIONS: dict[str, Callable[[Path], Any]] = {
    ".json": read_json,
    OPERATORS: _lines,
    ORT: ort.read,
}
