"""How a tokenizer splits text before it merges bytes, as llama.cpp names it.

llama.cpp does not read the regular expression of a tokenizer. It has a list of names, and each name
stands for expressions and flags in its program. Here the expressions and flags of a
``tokenizer.json`` decide which name it is, never the name of a model.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from exporter.errors import InputError, short

#: What an error advises for a tokenizer that llama.cpp does not have.
REMEDY = (
    "Leave the target gguf out, or remove tokenizer.json from the folder: "
    "the file then has no vocabulary and reads token ids"
)
#: Every number character, and runs of numbers.
_DIGIT, _DIGITS = r"\p{N}", r"\p{N}+"
#: The expression of GPT-2, which a ByteLevel has built in.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _words(letters: str, numbers: str) -> str:
    """The expression of cl100k and its relatives, which differ in two places."""
    return (
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?{letters}+|{numbers}"
        rf"| ?[^\s{letters.strip('[]')}\p{{N}}]+[\r\n]*|{_SPACES}"
    )


_LLAMA3, _QWEN2 = _words(r"\p{L}", r"\p{N}{1,3}"), _words(r"\p{L}", r"\p{N}")
_QWEN3_5 = _words(r"[\p{L}\p{M}]", r"\p{N}")
#: Other spellings that find the same words. A quantifier that gives nothing back (`?+`, `++`) finds
#: the same where what follows cannot match what it took, and `\s*` takes all but the last newline.
_SPELLINGS = {
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": _GPT2,
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+": _LLAMA3,
}
#: Expressions that match every character, so nothing is left between two matches.
_COMPLETE = frozenset({_GPT2, _LLAMA3, _QWEN2, _QWEN3_5})
#: llama.cpp's name by the expressions, in their order, and the flag `ignore_merges`.
_NAMES: Mapping[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    ((_DIGIT, _GPT2), False): "smollm",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "dbrx",
    ((_QWEN2,), False): "qwen2",
    ((_QWEN3_5,), False): "qwen35",
}


def pre_tokenizer_name(part: object, ignore_merges: bool, path: Path) -> str:
    """llama.cpp's name of a ``pre_tokenizer``. Raises InputError if it has none."""
    subject = f"{path}: pre_tokenizer"
    steps = list(_steps(part, subject))
    kinds = [step.get("type") for step in steps]
    if kinds.count("ByteLevel") != 1 or kinds[-1] != "ByteLevel":
        raise InputError(subject, "does not end with its only ByteLevel", REMEDY)
    expressions = tuple(found for step in steps for found in _expressions(step, subject))
    name = _NAMES.get((expressions, ignore_merges))
    if name is None:
        other_flag = (expressions, not ignore_merges) in _NAMES
        flag = f" and ignore_merges {str(ignore_merges).lower()}" if other_flag else ""
        what = f"splits text by {short(list(expressions))}{flag}, which llama.cpp does not have"
        raise InputError(subject, what, REMEDY)
    return name


def _steps(part: object, subject: str) -> Iterator[Mapping[str, Any]]:
    """The steps of a pre-tokenizer, which may be a sequence of others."""
    if not isinstance(part, dict):
        raise InputError(subject, f"{short(part)} does not split text into bytes", REMEDY)
    if part.get("type") != "Sequence":
        yield part
        return
    parts = part.get("pretokenizers")
    for one in parts if isinstance(parts, list) else [parts]:
        yield from _steps(one, subject)


def _expressions(step: Mapping[str, Any], subject: str) -> Sequence[str]:
    """The expression that a step splits by, if any. The pieces between matches are kept."""
    kind = step.get("type")
    if kind == "ByteLevel":
        if step.get("add_prefix_space", True):
            raise InputError(subject, "add_prefix_space is not supported by llama.cpp", REMEDY)
        return [_GPT2] if step.get("use_regex", True) else []
    if kind == "Digits":
        return [_DIGIT if step.get("individual_digits") else _DIGITS]
    if kind == "Split":
        return [_split(step, subject)]
    raise InputError(subject, f"{short(kind)} is not supported by llama.cpp", REMEDY)


def _split(step: Mapping[str, Any], subject: str) -> str:
    pattern, behavior = step.get("pattern"), step.get("behavior")
    found = pattern.get("Regex") if isinstance(pattern, dict) else None
    if not isinstance(found, str):
        raise InputError(subject, f"the pattern {short(pattern)} is no expression", REMEDY)
    expression = _SPELLINGS.get(found, found)
    removes_nothing = behavior == "Removed" and step.get("invert") and expression in _COMPLETE
    if behavior != "Isolated" and not removes_nothing:
        raise InputError(subject, f"a Split that is {short(behavior)} is not supported", REMEDY)
    return expression
