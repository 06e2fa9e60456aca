"""The tokenizer in a GGUF file: vocabulary, merges, special tokens, chat template.

llama.cpp makes its own tokenizer from these fields. `tokenizer_fields` gives them only if it then
finds the same token ids as ``tokenizer.json``; a part that llama.cpp does not have is refused. What
remains are differences of llama.cpp itself, as of the version that the extra ``llama-cpp`` has:

- It does not compose characters. A tokenizer whose normalizer is NFC (Qwen) gives the same ids for
  text that is in that form already.
- Its tables of characters are those of Unicode 15: letters and digits of 2024 and later are split
  as signs.
- Of added tokens that overlap in the text, it takes the longest, ``tokenizer.json`` the first.
- Bytes that the vocabulary lacks (six control characters of SmolLM2) are left out by both, but only
  ``tokenizer.json`` then merges the bytes on their two sides.
- It ends at tokens that it knows by their text, such as ``<|endoftext|>``, whatever the model says.
"""

from collections.abc import Mapping
from pathlib import Path

from exporter.backends.gguf.splitting import REMEDY
from exporter.backends.gguf.tokenizer_json import UNUSED, ByteLevelBPE, read_tokenizer
from exporter.errors import InputError
from exporter.foreign import present, read_json
from exporter.model.checkpoint import special_tokens
from exporter.model.config import ModelConfig, parse_config
from exporter.text.tokenizer import TOKENIZER_BYTES, template_of

Fields = dict[str, str | bool | int | list[bytes] | list[int]]

#: Tokens of text that llama.cpp always ends at, by their text.
_KNOWN_ENDS = frozenset(
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> "
    "<|endoftext|> </s> <|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> "
    "<eos> <turn|> <|tool_response> <｜end▁of▁sentence｜> [e~[".split()
)


def check_tokenizer(folder: Path) -> None:
    """Raise InputError for a model folder whose tokenizer llama.cpp cannot reproduce."""
    config = parse_config(read_json(folder / "config.json"), folder / "config.json")
    tokenizer_fields(folder, config, *special_tokens(folder, config.vocab_size))


def tokenizer_fields(
    folder: Path, config: ModelConfig, bos: int | None, ends: tuple[int, ...]
) -> Fields:
    """The fields of a GGUF file that hold the tokenizer of a model folder, in the order of the
    file: int is uint32, list[int] an array of int32, list[bytes] an array of strings.

    `bos` begins a text and `ends` end one. Without ``tokenizer.json`` the file has no vocabulary,
    and the number of tokens is ``<architecture>.vocab_size``. Raises InputError.
    """
    path = folder / "tokenizer.json"
    if not present(path, TOKENIZER_BYTES):
        return {"tokenizer.ggml.model": "none"}
    tokenizer = read_tokenizer(path)
    largest = max(tokenizer.tokens)
    if largest >= config.vocab_size:
        raise InputError(
            path,
            f"token {largest} is not one of the model's {config.vocab_size}",
            "Correct vocab_size, or get the tokenizer of this model",
        )
    template, special = template_of(folder)
    ids = {text: token for token, (text, _) in tokenizer.tokens.items()}
    tokens = [
        tokenizer.tokens.get(token, (f"[PAD{token}]", UNUSED)) for token in range(config.vocab_size)
    ]
    if len({text for text, _ in tokens}) < len(tokens):  # llama.cpp would end the process
        raise InputError(path, "has a token [PAD…], the name of tokens that are not used", REMEDY)
    named = {name: ids[text] for name, text in special.items() if text in ids}
    fields: Fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": tokenizer.pre,
        "tokenizer.ggml.tokens": [text.encode() for text, _ in tokens],
        "tokenizer.ggml.token_type": [kind for _, kind in tokens],
        "tokenizer.ggml.merges": [merge.encode() for merge in tokenizer.merges],
    }
    fields |= _special_ids(tokenizer, named, bos, ends, path)
    for name, field in (("pad_token", "padding"), ("unk_token", "unknown")):
        if name in named:
            fields[f"tokenizer.ggml.{field}_token_id"] = named[name]
    fields["tokenizer.ggml.add_bos_token"] = tokenizer.begin is not None
    fields["tokenizer.ggml.add_eos_token"] = tokenizer.end is not None
    fields["tokenizer.ggml.add_space_prefix"] = False
    if template is not None:
        fields["tokenizer.chat_template"] = template
    return fields


def _special_ids(
    tokenizer: ByteLevelBPE,
    named: Mapping[str, int],
    bos: int | None,
    ends: tuple[int, ...],
    path: Path,
) -> dict[str, int]:
    """The ids that begin and end a text. llama.cpp has three fields for ends, besides the tokens
    that it knows by their text. Chat templates get ``bos_token`` and ``eos_token`` from here."""
    all_ends = list(dict.fromkeys([*ends, *([tokenizer.end] if tokenizer.end is not None else [])]))
    eos = next(
        (token for token in (tokenizer.end, named.get("eos_token")) if token in all_ends),
        all_ends[0] if all_ends else named.get("eos_token"),
    )
    begins = [tokenizer.begin, named.get("bos_token"), bos, eos]
    # Without a field, llama.cpp takes token 11 for both.
    found = {"bos": next((token for token in begins if token is not None), None), "eos": eos}
    others = [
        token
        for token in all_ends
        if token != eos and tokenizer.tokens.get(token, ("", 0))[0] not in _KNOWN_ENDS
    ]
    if len(others) > 2:
        raise InputError(
            path.with_name("generation_config.json"),
            f"eos_token_id has {len(all_ends)} tokens, more than llama.cpp can end at",
            "Leave some out",
        )
    found |= zip(("eot", "eom"), others, strict=False)
    return {f"tokenizer.ggml.{name}_token_id": i for name, i in found.items() if i is not None}
