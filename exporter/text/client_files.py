"""The tokenizer's configuration as the clients of other languages read it.

transformers.js and swift-transformers look for the chat template in ``tokenizer_config.json`` only,
and transformers before 5 does not know the classes that transformers 5 writes.
"""

from collections.abc import Mapping, Sequence
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


def tokenizer_config(folder: Path, bos: int | None, ends: Sequence[int]) -> dict[str, Any] | None:
    """A ``tokenizer_config.json`` for all clients, from the files of a model folder.

    It has the chat template inlined as ``chat_template``, if there is one, the special tokens as
    text, and the class that leaves everything to ``tokenizer.json``. `bos` begins a text and `ends`
    end one: a ``bos_token`` that no file names is that of `bos`, an ``eos_token`` that of the first
    of `ends`, and a missing ``pad_token`` is the ``eos_token``. None for a folder without
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
    found |= _special_tokens(folder, given, bos, next(iter(ends), None))
    found.pop("chat_template", None)
    if template is not None:
        found["chat_template"] = template
    found["tokenizer_class"] = _CLASS
    return found


def _special_tokens(
    folder: Path, given: Mapping[str, Any], bos: int | None, end: int | None
) -> dict[str, str]:
    """The special tokens by name, such as ``eos_token``. null in the configuration stays."""
    found = {**token_texts(_json(folder / "special_tokens_map.json")), **token_texts(given)}
    for name, token in (("bos_token", bos), ("eos_token", end)):
        if token is None or name in found or name in given:
            continue
        text = load_tokenizer(folder).text_of(token)
        if text is not None:
            found[name] = text
    if "eos_token" in found:
        found.setdefault("pad_token", found["eos_token"])
    return found


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if present(path) else {}
