"""How the model in one package differs from that in another.

If nothing differs, both packages compute the same from the same constants. The order of the bytes
in a weight file does not matter.
"""

import json
import os
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exporter.backends.coreml import MANIFEST
from exporter.backends.coreml.package import (
    FLOATS,
    Package,
    Value,
    place_of,
    weight_file_rest,
)
from exporter.files import read_json

Difference = tuple[str, str]
#: The version of the tool that wrote the package, and what coremltools records of itself.
_VERSION, _USER_DEFINED = ("description", "metadata.versionString"), "metadata.userDefined"
_TOOLKITS_KEYS, _BUILD_INFO = "com.github.apple.coremltools.", "buildInfo"
#: Texts of a foreign file are cut at this length.
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 120
#: Fields of the protobuf that a path leaves out: what is in them has a name of its own.
_UNNAMED = frozenset(
    "functions block_specializations inputs attributes arguments value immediateValue".split()
)
_VALUE, _BLOCK = "CoreML.Specification.MILSpec.Value", "CoreML.Specification.MILSpec.Block"
#: A Value that holds others is compared value by value.
_COLLECTIONS = ("tuple", "list", "dictionary")


def package_differences(found: Package, expected: Package) -> Iterator[Difference]:
    """Each difference as the place in the package and what differs there.

    It compares the names of the files, the manifest without its random identifiers, every field of
    the protobuf, and every constant by the bytes that it points to. The operations of a function
    are compared by name and in order. These fields are left out, since they record the versions of
    tools: ``description.metadata.versionString``, the entries of ``userDefined`` that begin with
    ``com.github.apple.coremltools.``, and the attribute ``buildInfo`` of the program.

    `expected` is trusted. Raises InputError for a constant of `found` that cannot be read.
    """
    yield from _file_differences(found.path, expected.path)
    yield from _manifest_differences(read_json(found.path / MANIFEST), expected.path)
    known = type(found.spec)()
    known.CopyFrom(found.spec)
    known.DiscardUnknownFields()
    if known.ByteSize() != found.spec.ByteSize():
        yield "model", "has fields that are not in the format"
    comparison = _Comparison(found, expected)
    for field in expected.spec.DESCRIPTOR.fields:
        yield from comparison.field(field, found.spec, expected.spec, field.name, "")
    yield from comparison.weight_files()


def _file_differences(found: Path, expected: Path) -> Iterator[Difference]:
    if found.is_symlink():
        yield found.name, "is a link"
    files, wanted = set(_entries(found)), set(_entries(expected))
    for name, kind in sorted(files - wanted):
        yield _shown(name), f"is a {kind} that is not part of the package"
    for name, kind in sorted(wanted - files):
        yield name, f"is missing as a {kind}"


def _entries(folder: Path) -> Iterator[tuple[str, str]]:
    """Every entry below a folder and its kind. No link is followed."""
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(root, name)
            kind = "folder" if path.is_dir() else "file" if path.is_file() else "special file"
            yield path.relative_to(folder).as_posix(), "link" if path.is_symlink() else kind


def _manifest_differences(manifest: Mapping[str, Any], expected: Path) -> Iterator[Difference]:
    found = _without_identifiers(manifest)
    wanted = _without_identifiers(read_json(expected / MANIFEST))
    for key in sorted(found.keys() | wanted.keys()):
        if found.get(key) != wanted.get(key):
            yield (
                MANIFEST,
                f"{_shown(key)} is {_short(found.get(key))}, not {_short(wanted.get(key))}",
            )


def _without_identifiers(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest whose entries have no random identifiers: what each describes, in order."""
    items = manifest["itemInfoEntries"]
    return {
        **manifest,
        "itemInfoEntries": sorted(json.dumps(item, sort_keys=True) for item in items.values()),
        "rootModelIdentifier": items[manifest["rootModelIdentifier"]],
    }


class _Comparison:
    """Compares the messages of two protobufs: the fields that they have, and their constants."""

    def __init__(self, found: Package, expected: Package) -> None:
        self._packages = found, expected
        #: The places of constants that were compared, so that no shared one is compared again.
        self._same = set[tuple[Any, ...]]()
        #: Weight file → offset of each record in use → bytes of its data; of both packages.
        self._used = dict[Path, dict[int, int]](), dict[Path, dict[int, int]]()

    def field(
        self, field: Any, found: Any, expected: Any, place: str, path: str
    ) -> Iterator[Difference]:
        """Compare one field of two messages; `path` leads to the field from `place`."""
        if (place, path) == _VERSION:
            return
        one, other = getattr(found, field.name), getattr(expected, field.name)
        if field.message_type and field.message_type.GetOptions().map_entry:
            is_record = _is_record(field, place, path)
            yield from self._map(one, other, place, path, is_record)
        elif field.is_repeated:
            yield from self._list(field, one, other, place, path)
        elif field.has_presence and found.HasField(field.name) != expected.HasField(field.name):
            yield place, _at(path, "is missing" if expected.HasField(field.name) else "is extra")
        elif not field.message_type:
            if _bits(one) != _bits(other):
                yield place, _at(path, f"is {_short(one)}, not {_short(other)}")
        elif found.HasField(field.name):
            yield from self._message(one, other, place, path)

    def _message(self, found: Any, expected: Any, place: str, path: str) -> Iterator[Difference]:
        kind = expected.DESCRIPTOR.full_name
        if kind == _VALUE:
            yield from self._value(found, expected, place, path)
            return
        for field in expected.DESCRIPTOR.fields:
            if kind == _BLOCK and field.name == "operations":
                yield from self._operations(found.operations, expected.operations, place)
            else:
                yield from self.field(field, found, expected, place, _deeper(path, field.name))

    def _map(
        self,
        found: Any,
        expected: Any,
        place: str,
        path: str,
        is_record: Callable[[str], bool],
    ) -> Iterator[Difference]:
        for key in sorted({*found, *expected}, key=str):
            if is_record(str(key)):
                continue
            where = _deeper(path, _shown(str(key)))
            if key not in found or key not in expected:
                yield place, _at(where, "is missing" if key in expected else "is extra")
            elif hasattr(expected[key], "DESCRIPTOR"):
                if place == "mlProgram" and not path:  # a function is a place of its own
                    yield from self._message(found[key], expected[key], key, "")
                else:
                    yield from self._message(found[key], expected[key], place, where)
            elif found[key] != expected[key]:
                yield place, _at(where, f"is {_short(found[key])}, not {_short(expected[key])}")

    def _list(
        self, field: Any, found: Any, expected: Any, place: str, path: str
    ) -> Iterator[Difference]:
        if len(found) != len(expected):
            yield place, _at(path, f"has {len(found)} entries, not {len(expected)}")
            return
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            name = getattr(other, "name", "")
            if name and name == getattr(one, "name", ""):
                where = _deeper(path, name)
            else:
                where = f"{path}[{index}]" if len(expected) > 1 else path
            if field.message_type:
                yield from self._message(one, other, place, where)
            elif _bits(one) != _bits(other):
                yield place, _at(where, f"is {_short(one)}, not {_short(other)}")

    def _operations(
        self, found: Sequence[Any], expected: Sequence[Any], place: str
    ) -> Iterator[Difference]:
        """Compare operations of the same name, then their order."""
        ours, theirs = _by_name(found), _by_name(expected)
        for name in sorted(ours.keys() - theirs.keys()):
            yield f"{place}: op {_shown(name[0])}", f"is extra: {_shown(ours[name].type)}"
        for name in sorted(theirs.keys() - ours.keys()):
            yield f"{place}: op {name[0]}", f"is missing: {theirs[name].type}"
        common = [name for name in ours if name in theirs]
        for name in common:
            constant = theirs[name].type == "const" or theirs[name].type.startswith("constexpr_")
            where = f"{place}: {'' if constant else 'op '}{name[0]}"
            yield from self._message(ours[name], theirs[name], where, "")
        in_order = [name for name in theirs if name in ours]
        for name, wanted in zip(common, in_order, strict=True):
            if name != wanted:
                yield place, f"computes {name[0]} where {wanted[0]} is expected"
                return

    def _value(self, found: Any, expected: Any, place: str, path: str) -> Iterator[Difference]:
        """Compare two constants by type, file and content."""
        path = "" if path == "val" else path
        files = found.blobFileValue.fileName, expected.blobFileValue.fileName
        if all(files) and files[0] != files[1]:
            yield place, _at(path, f"is in the file {_short(files[0])}, not {_short(files[1])}")
        for name in ("docString", "type"):
            field = expected.DESCRIPTOR.fields_by_name[name]
            yield from self.field(field, found, expected, place, _deeper(path, name))
        if _serialized(found.type) != _serialized(expected.type):
            return
        if any(
            value.immediateValue.WhichOneof("value") in _COLLECTIONS for value in (found, expected)
        ):
            field = expected.DESCRIPTOR.fields_by_name["immediateValue"]
            yield from self.field(field, found, expected, place, path)
        elif not self._same_content(found, expected):
            ours, theirs = self._packages
            yield place, _at(path, _content_difference(ours.value(found), theirs.value(expected)))

    def _same_content(self, found: Any, expected: Any) -> bool:
        """Whether two constants of one type are equal: bytes of a file, or numbers in place."""
        places = place_of(found), place_of(expected)
        if None in places:
            if places == (None, None):
                return _serialized(found.immediateValue) == _serialized(expected.immediateValue)
            ours, theirs = (
                package.value(value)
                for package, value in zip(self._packages, (found, expected), strict=True)
            )
            return isinstance(ours, Value) and _equal_bits(ours, theirs)
        key = (*places, _serialized(found.type))
        if key in self._same:
            return True
        one, other = (
            package.blob(value)
            for package, value in zip(self._packages, (found, expected), strict=True)
        )
        for used, blob, value in zip(self._used, (one, other), (found, expected), strict=True):
            used.setdefault(blob.path, {})[value.blobFileValue.offset] = blob.content.size
        same = (one.kind, one.padding) == (other.kind, other.padding) and np.array_equal(
            one.content, other.content
        )
        if same:
            self._same.add(key)
        return same

    def weight_files(self) -> Iterator[Difference]:
        """Compare the weight files by what no constant uses of them, and by their headers."""
        found, expected = (
            {path.name: weight_file_rest(path, used) for path, used in files.items()}
            for files in self._used
        )
        for name in sorted(found.keys() | expected.keys()):
            if found.get(name) != expected.get(name):
                yield (
                    _shown(name),
                    f"has records and bytes that no constant uses, and a version of the format: "
                    f"{found.get(name)}, not {expected.get(name)}",
                )


def _by_name(operations: Sequence[Any]) -> dict[tuple[str, int], Any]:
    """Operations by the name of the first output, or their own, counted where it is not unique."""
    named, seen = dict[tuple[str, int], Any](), Counter[str]()
    for operation in operations:
        own = operation.attributes.get("name")
        texts = own.immediateValue.tensor.strings.values if own else []
        name = operation.outputs[0].name if operation.outputs else (texts or [operation.type])[0]
        named[name, seen[name]] = operation
        seen[name] += 1
    return named


def _content_difference(found: Any, expected: Any) -> str:
    """How two constants of one type differ."""
    if not (isinstance(found, Value) and isinstance(expected, Value)):
        return f"is {_short(found)}, not {_short(expected)}"
    different = _as_bits(found) != _as_bits(expected)
    count = int(different.sum())
    if not count:
        return "is stored in another way"
    first = tuple(different.nonzero()[0].tolist())
    values = f"{found.data[first].item():g}, not {expected.data[first].item():g}"
    if found.data.numel() == 1:
        return f"is {values}"
    return f"{count} of {found.data.numel()} values differ, first at {list(first)}: {values}"


def _equal_bits(found: Value, expected: Value) -> bool:
    return torch.equal(_as_bits(found), _as_bits(expected))


def _as_bits(value: Value) -> torch.Tensor:
    """As bits, NaN equals itself and 0.0 differs from -0.0."""
    return value.data.view(torch.int32) if value.kind in FLOATS else value.data


def _is_record(field: Any, place: str, path: str) -> Callable[[str], bool]:
    """Which keys of a map record versions of coremltools."""
    if (place, path) == ("description", _USER_DEFINED):
        return lambda key: key.startswith(_TOOLKITS_KEYS)
    if (place, path, field.name) == ("mlProgram", "", "attributes"):
        return lambda key: key == _BUILD_INFO
    return lambda key: False


def _serialized(message: Any) -> bytes:
    content: bytes = message.SerializeToString(deterministic=True)
    return content


def _bits(value: Any) -> Any:
    return value.hex() if isinstance(value, float) else value


def _short(value: Any) -> str:
    """A value of a foreign file for a message. It may be long, or hold control characters."""
    return _REPR.repr(value)


def _shown(name: str) -> str:
    """A name of a foreign file for a message, in quotes if it is not a plain one."""
    plain = len(name) <= _REPR.maxstring and name.isascii() and name.isprintable()
    return name if plain else _short(name)


def _deeper(path: str, name: str) -> str:
    if name in _UNNAMED:
        return path
    return f"{path}.{name}" if path else name


def _at(path: str, what: str) -> str:
    return f"{path} {what}" if path else what
