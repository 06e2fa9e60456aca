"""The tokenizer's configuration as the clients of other languages read it.

transformers.js and swift-transformers look for the chat template in ``tokenizer_config.json`` only,
and transformers before 5 does not know the classes that transformers 5 writes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporter.foreign import present, read_json
from exporter.text.tokenizer import TOKENIZER_BYTES, load_tokenizer, template_of, token_texts

#: Every client has this class, which does what ``tokenizer.json`` says and nothing else, as
#: `TextTokenizer` does. Classes of a model family may put other parts in place of those in the
#: file.
_CLASS = "PreTrainedTokenizerFast"
#: Left out: what `_CLASS` does not need, what would change the tokenizer.json, what records how
#: transformers 5 last opened the tokenizer, and code that is not in the folder.
_LEFT_OUT = frozenset({
    "add_bos_token", "add_eos_token", "add_prefix_space", "auto_map", "backend", "is_local",
    "legacy", "local_files_only", "name_or_path", "special_tokens_map_file", "tokenizer_file",
    "use_fast",
})  # fmt: skip


def tokenizer_config(folder: Path) -> dict[str, Any] | None:
    """A ``tokenizer_config.json`` for all clients, from the files of a model folder.

    It has the chat template inlined as ``chat_template``, if there is one, the special tokens as
    text, and the class that leaves everything to ``tokenizer.json``. A ``bos_token`` or
    ``eos_token`` that no file names is the token of the first id in ``generation_config.json`` or
    ``config.json``, and a missing ``pad_token`` is the ``eos_token``. None for a folder without
    ``tokenizer.json``. Raises InputError for files that cannot be read.
    """
    if not present(folder / "tokenizer.json", TOKENIZER_BYTES):
        return None
    given = _json(folder / "tokenizer_config.json")
    template, _ = template_of(folder)
    found = {key: value for key, value in given.items() if key not in _LEFT_OUT}
    if isinstance(found.get("extra_special_tokens"), list):
        # transformers 5 writes a list, which transformers 4 reads under the older name.
        found["additional_special_tokens"] = found.pop("extra_special_tokens")
    found |= _special_tokens(folder, given)
    found.pop("chat_template", None)
    if template is not None:
        found["chat_template"] = template
    found["tokenizer_class"] = _CLASS
    return found


def _special_tokens(folder: Path, given: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens by name, such as ``eos_token``. null in the configuration stays."""
    found = {**token_texts(_json(folder / "special_tokens_map.json")), **token_texts(given)}
    for name in ("bos_token", "eos_token"):
        token = None if {name} & {*found, *given} else _first_id(folder, f"{name}_id")
        text = None if token is None else load_tokenizer(folder).text_of(token)
        if text is not None:
            found[name] = text
    if "eos_token" in found:
        found.setdefault("pad_token", found["eos_token"])
    return found


def _first_id(folder: Path, key: str) -> int | None:
    for name in ("generation_config.json", "config.json"):
        value = _json(folder / name).get(key)
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, int) and not isinstance(first, bool) and 0 <= first < 1 << 31:
            return first
    return None


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if present(path) else {}
