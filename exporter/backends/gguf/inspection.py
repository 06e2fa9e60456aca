"""Inspect any GGUF file: the model, the types of its tensors, its tokenizer.

mobilellm inspect build/nano/gguf/model.gguf
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporter.backends import InspectedTable, Inspection
from exporter.backends.gguf.contents import Contents, Value, open_contents
from exporter.backends.gguf.metadata import MAX_CONTEXT, QUANTIZED_HASH

#: Label of a fact → key of the metadata; the family's name stands for ``{}``.
_FACTS = {
    "name": "general.name",
    "licence": "general.license",
    "context": "{}.context_length",
    "layers": "{}.block_count",
    "hidden size": "{}.embedding_length",
    "heads": "{}.attention.head_count",
    "key/value heads": "{}.attention.head_count_kv",
    "RoPE base": "{}.rope.freq_base",
    "tokenizer": "tokenizer.ggml.model",
    "pre-tokenizer": "tokenizer.ggml.pre",
    "verified context": MAX_CONTEXT,
    "quantized checkpoint": QUANTIZED_HASH,
}
_TEMPLATE, _TOKENS = "tokenizer.chat_template", "tokenizer.ggml.tokens"


def inspect(path: Path) -> Inspection:
    """The content of a file from any tool. Raises InputError."""
    contents = open_contents(path)
    family = contents.architecture
    types = _types(contents)
    facts = {"architecture": family or "not given", "format": f"GGUF {contents.version}"}
    facts["parameters"] = f"{sum(values for _, values, _ in types.values()):,}"
    for label, key in _FACTS.items():
        value = contents.metadata.get(key.format(family))
        if value is not None and not value.type.startswith("["):
            facts[label] = _shown(value)
    if tokens := contents.metadata.get(_TOKENS):
        facts["vocabulary"] = f"{len(tokens.value):,} tokens"
    facts["chat template"] = "yes" if _TEMPLATE in contents.metadata else "no"
    rows = [
        (kind, f"{count:,}", f"{values:,}", f"{size:,}")
        for kind, (count, values, size) in types.items()
    ]
    table = InspectedTable(
        ("type", "tensors", "parameters", "bytes"), rows, "tensors by type", numbers=True
    )
    return Inspection(_content(contents, types), f"{path}: GGUF", facts, [table])


def _types(contents: Contents) -> dict[str, tuple[int, int, int]]:
    """Type of tensors → how many there are, and their numbers and bytes; the largest first."""
    found = dict[str, tuple[int, int, int]]()
    for tensor in contents.tensors.values():
        count, values, size = found.get(tensor.type.name, (0, 0, 0))
        values += math.prod(tensor.shape)
        found[tensor.type.name] = count + 1, values, size + tensor.bytes
    return dict(sorted(found.items(), key=lambda entry: -entry[1][2]))


def _content(contents: Contents, types: Mapping[str, tuple[int, int, int]]) -> dict[str, Any]:
    """The content for JSON. Arrays of the tokenizer are given by their length."""
    return {
        "version": contents.version,
        "metadata": {key: _plain(value) for key, value in contents.metadata.items()},
        "types": {
            kind: {"tensors": count, "parameters": values, "bytes": size}
            for kind, (count, values, size) in types.items()
        },
        "tensors": {
            name: {"type": tensor.type.name, "shape": list(tensor.shape)}
            for name, tensor in contents.tensors.items()
        },
    }


def _plain(value: Value) -> Any:
    if value.type.startswith("["):
        return {"type": value.type, "entries": len(value.value)}
    if isinstance(value.value, str):
        return value.value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return value.value if value.type != "BOOL" else bool(value.value)


def _shown(value: Value) -> str:
    found = _plain(value)
    return f"{found:,}" if isinstance(found, int) else str(found)
