"""What a ``tokenizer.json`` consists of, as far as llama.cpp has it.

Everything else is refused: llama.cpp would give other token ids, without a word.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.backends.gguf.splitting import REMEDY, pre_tokenizer_name
from exporter.errors import InputError, short
from exporter.foreign import read_json
from exporter.text.tokenizer import TOKENIZER_BYTES

#: Types of tokens in a GGUF file.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
#: Bytes that occur in UTF-8.
_UTF8 = frozenset(range(256)) - {0xC0, 0xC1, *range(0xF5, 0x100)}


@dataclass(frozen=True)
class ByteLevelBPE:
    """A tokenizer that merges bytes.

    `tokens` has text and type by id, `merges` the two texts with a space between them, and `pre` is
    llama.cpp's name of the way to split text. `begin` and `end` are the ids that are added to a
    text, or None.
    """

    tokens: Mapping[int, tuple[str, int]]
    merges: Sequence[str]
    pre: str
    begin: int | None
    end: int | None


def read_tokenizer(path: Path) -> ByteLevelBPE:
    """Read a ``tokenizer.json``. Raises InputError for what llama.cpp does not have."""
    content = read_json(path, TOKENIZER_BYTES)
    model = content.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        kind = short(model.get("type") if isinstance(model, dict) else model)
        raise InputError(f"{path}: model", f"{kind} is not a byte-level BPE", REMEDY)
    _check_unsupported(content, model, path)
    vocabulary = _vocabulary(model.get("vocab"), path)
    tokens = {token: (text, NORMAL) for text, token in vocabulary.items()}
    tokens |= _added_tokens(content.get("added_tokens"), vocabulary, path)
    _check_bytes(vocabulary, model, path)
    begin, end = _added_to_texts(content.get("post_processor"), path)
    for token in (begin, end):
        if token is not None and token not in tokens:
            raise InputError(f"{path}: post_processor", f"adds {token}, which is no token", REMEDY)
    pre = pre_tokenizer_name(content.get("pre_tokenizer"), bool(model.get("ignore_merges")), path)
    return ByteLevelBPE(
        tokens, list(_merges(model.get("merges"), vocabulary, path)), pre, begin, end
    )


def _check_unsupported(content: Mapping[str, Any], model: Mapping[str, Any], path: Path) -> None:
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            raise InputError(f"{path}: model.{key}", "is not supported by llama.cpp", REMEDY)
    for key in ("truncation", "padding"):
        if content.get(key):
            raise InputError(f"{path}: {key}", "changes the length of texts", "Make it null")
    normalizers = [kind for kind, _ in _flat(content.get("normalizer"), "normalizers")]
    decoders = [kind for kind, _ in _flat(content.get("decoder"), "decoders")] or [None]
    for key, kinds, known in (
        ("normalizer", normalizers, "NFC"),
        ("decoder", decoders, "ByteLevel"),
    ):
        others = [kind for kind in kinds if kind != known]
        if others:
            raise InputError(f"{path}: {key}", f"{short(others[0])} is not llama.cpp's", REMEDY)


def _flat(part: object, parts: str) -> Iterator[tuple[object, Mapping[str, Any]]]:
    """The type and content of a part, or of each part of a sequence. A missing one has none."""
    if isinstance(part, dict) and part.get("type") == "Sequence":
        inner = part.get(parts)
        for one in inner if isinstance(inner, list) else [inner]:
            yield from _flat(one, parts)
    elif part is not None:
        yield (part.get("type"), part) if isinstance(part, dict) else (short(part), {})


def _vocabulary(vocab: object, path: Path) -> dict[str, int]:
    subject = f"{path}: model.vocab"
    if not isinstance(vocab, dict) or not vocab:
        raise InputError(subject, "holds no tokens", "Get the file again")
    for text, token in vocab.items():
        if not _is_id(token):
            raise InputError(subject, f"{short(text)} has the id {short(token)}", "Correct it")
    if len(set(vocab.values())) < len(vocab):
        raise InputError(subject, "gives one id to two tokens", "Get the file again")
    return vocab


def _added_tokens(
    added: object, vocabulary: Mapping[str, int], path: Path
) -> dict[int, tuple[str, int]]:
    """The added tokens. As in `tokenizers`, a new one gets the next free id, whatever the file
    says, so a file that says something else is refused."""
    subject = f"{path}: added_tokens"
    found, next_id = dict[int, tuple[str, int]](), len(vocabulary)
    for entry in added if isinstance(added, list) else []:
        text, token = (entry.get("content"), entry.get("id")) if isinstance(entry, dict) else (0, 0)
        if not isinstance(text, str) or not text or not _is_id(token) or token in found:
            raise InputError(subject, f"{short(entry)} is no token of its own", "Correct it")
        if any(entry.get(flag) for flag in ("single_word", "lstrip", "rstrip")):
            raise InputError(subject, f"{short(text)} depends on what is beside it", REMEDY)
        expected = vocabulary.get(text, next_id)
        next_id += text not in vocabulary
        if token != expected:
            raise InputError(
                subject, f"{short(text)} has the id {token}, not {expected}", "Correct it"
            )
        found[token] = (text, CONTROL if entry.get("special") else USER_DEFINED)
    if len({text for text, _ in found.values()}) < len(found):
        raise InputError(subject, "has the same token twice", "Correct it")
    return found


def _is_id(token: object) -> bool:
    return isinstance(token, int) and not isinstance(token, bool) and 0 <= token < 1 << 31


def _check_bytes(vocabulary: Mapping[str, int], model: Mapping[str, Any], path: Path) -> None:
    if model.get("unk_token") is None:
        return
    lacking = [byte for byte, text in _byte_texts().items() if text not in vocabulary]
    if lacking:
        raise InputError(
            f"{path}: model.unk_token",
            f"stands for {len(lacking)} bytes that the vocabulary lacks",
            REMEDY,
        )


def _byte_texts() -> dict[int, str]:
    """The character that stands for each byte of UTF-8 in a byte-level vocabulary: itself if it is
    a visible one of Latin-1, else the next after U+00FF."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0x100)} - {0xAD}
    hidden = [byte for byte in range(256) if byte not in visible]
    texts = {byte: chr(byte) for byte in visible}
    texts |= {byte: chr(0x100 + place) for place, byte in enumerate(hidden)}
    return {byte: texts[byte] for byte in _UTF8}


def _merges(merges: object, vocabulary: Mapping[str, int], path: Path) -> Iterator[str]:
    """The merges as two texts with a space between them."""
    subject, seen = f"{path}: model.merges", set[str]()
    for entry in merges if isinstance(merges, list) else [merges]:
        parts = entry.split(" ") if isinstance(entry, str) else entry
        if not isinstance(parts, list) or not _is_merge(parts, vocabulary):
            raise InputError(subject, f"{short(entry)} does not merge two tokens", REMEDY)
        merge = " ".join(parts)
        if merge in seen:
            raise InputError(subject, f"{short(merge)} occurs twice", "Get the file again")
        seen.add(merge)
        yield merge


def _is_merge(parts: Sequence[object], vocabulary: Mapping[str, int]) -> bool:
    """Whether both parts and the merged token are in the vocabulary, and no part has a space."""
    if len(parts) != 2 or not all(isinstance(part, str) for part in parts):
        return False
    one, two = map(str, parts)
    return {one, two, one + two} <= vocabulary.keys() and " " not in one + two


def _added_to_texts(part: object, path: Path) -> tuple[int | None, int | None]:
    """The ids that a post-processor adds before and after a text, None for neither."""
    begin = end = None
    for kind, one in _flat(part, "processors"):
        if kind == "ByteLevel":
            continue
        before, after = _template(one) if kind == "TemplateProcessing" else (None, None)
        if before is None or after is None or (begin, end) != (None, None):
            raise InputError(f"{path}: post_processor", f"{short(kind)} is not llama.cpp's", REMEDY)
        begin, end = next(iter(before), None), next(iter(after), None)
    return begin, end


def _template(part: Mapping[str, Any]) -> tuple[list[int] | None, list[int] | None]:
    """The ids before and after the text in a template, at most one each; else None."""
    before, after, texts = list[int](), list[int](), 0
    single, tokens = part.get("single"), part.get("special_tokens")
    for piece in single if isinstance(single, list) else [None]:
        if isinstance(piece, dict) and "Sequence" in piece:
            texts += 1
            continue
        name = piece.get("SpecialToken") if isinstance(piece, dict) else None
        name = name.get("id") if isinstance(name, dict) else None
        token = tokens.get(name) if isinstance(tokens, dict) and isinstance(name, str) else None
        ids = token.get("ids") if isinstance(token, dict) else None
        if not isinstance(ids, list) or not all(map(_is_id, ids)):
            return None, None
        (after if texts else before).extend(ids)
    fits = texts == 1 and len(before) < 2 and len(after) < 2
    return (before, after) if fits else (None, None)
