"""How the payload of the Core ML delegate in one .pte differs from that in another."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from exporter.backends import _comparison
from exporter.backends.executorch.coreml_delegate import (
    METADATA,
    embedded_package,
    identifier,
    payload_files,
)
from exporter.foreign import parse_json


def payload_differences(found: Path, expected: Path) -> Iterator[tuple[str, str]]:
    """How the payload of the program `found` differs from that of `expected`, file by file.

    The embedded packages are compared as the target `coreml` compares its packages. The identifier
    of a package must be the hash of its files. Raises InputError.
    """
    from exporter.backends.coreml.comparison import package_differences

    payloads = [payload_files(path) for path in (found, expected)]
    one, other = (dict.fromkeys(files, True) for files in payloads)
    yield from _comparison.differences(one, other, "payload")
    metadata = list[Any]()
    for path, files in zip((found, expected), payloads, strict=True):
        content = parse_json(bytes(files.pop(METADATA, b"")), f"{path}: {METADATA}")
        own = identifier(files)
        if isinstance(content, dict) and content.get("identifier") == own:
            content["identifier"] = "the hash of the package"
        metadata.append(content)
    yield from _comparison.differences(metadata[0], metadata[1], f"payload.{METADATA}")
    with embedded_package(found) as package, embedded_package(expected) as derived:
        yield from package_differences(package, derived)
