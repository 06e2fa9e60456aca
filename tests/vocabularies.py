"""Tokenizers of several kinds, and llama.cpp's reading of a GGUF file that has one."""

import ctypes
import json
import random
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pytest
from conftest import LLAMA, NANO, ROOT
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from exporter.backends.gguf.vocabulary import Fields, tokenizer_fields
from exporter.model.config import ModelConfig, parse_config

gguf = pytest.importorskip("gguf", reason="pip install 'mobilellm-exporter[gguf]'")
llama_cpp = pytest.importorskip(
    "llama_cpp", reason="pip install 'mobilellm-exporter[llama-cpp]': llama.cpp itself"
)

DATA = ROOT.parent / "shared" / "data"
LARGE = ROOT / "build" / "tokenizers"
SMOLLM2 = ROOT / "build" / "smollm2-135m"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [*sorted((ROOT / "exporter").rglob("*.py")), *sorted((ROOT / "devices").rglob("*.c*"))]

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN3_5 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

#: Letters and digits that Unicode 16 added in 2024; the tables of llama.cpp 0.3.36 are older.
NEW_CHARACTERS = [
    range(*bounds)
    for bounds in (
        (0x1C89, 0x1C8B), (0xA7CB, 0xA7CE), (0xA7DA, 0xA7DD), (0x105C0, 0x10600),
        (0x10D40, 0x10D90), (0x10EC2, 0x10EC5), (0x11380, 0x11400), (0x116D0, 0x11700),
        (0x11BC0, 0x11C00), (0x13456, 0x14400), (0x16100, 0x16140), (0x16D40, 0x16D80),
        (0x1CC00, 0x1CEC0), (0x1E5D0, 0x1E600),
    )
]  # fmt: skip
#: Tokens that llama.cpp takes to be control tokens by their text, whatever the file says.
CONTROL_BY_NAME = {
    "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>", "<|repo_name|>",
    "<|file_sep|>",
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A tokenizer by its folder; `pre` is what llama.cpp calls its way to split text."""

    folder: Path
    vocab_size: int
    pre: str
    bos: int | None = None
    ends: tuple[int, ...] = ()

    @property
    def fields(self) -> Fields:
        return tokenizer_fields(self.folder, config_of(self.vocab_size), self.bos, self.ends)

    @cached_property
    def content(self) -> dict[str, Any]:
        return json.loads((self.folder / "tokenizer.json").read_text())


def config_of(vocab_size: int) -> ModelConfig:
    return replace(parse_config(LLAMA, Path("config.json")), vocab_size=vocab_size)


# llama.cpp.


@llama_cpp.llama_log_callback
def log(level: int, text: bytes, _: object) -> None:
    """Nothing is shown: llama.cpp writes pages of it."""


class Vocabulary:
    """A GGUF file without weights, opened by llama.cpp."""

    def __init__(self, path: Path, fields: Fields) -> None:
        write_gguf(path, fields)
        llama_cpp.llama_log_set(log, ctypes.c_void_p())
        parameters = llama_cpp.llama_model_default_params()
        parameters.vocab_only = True
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        assert self.model, f"llama.cpp does not load {path}"
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)

    def encode(self, text: str, *, add: bool = False, special: bool = True) -> list[int]:
        data = text.encode()
        room = len(data) + 8
        ids = (llama_cpp.llama_token * room)()
        count = llama_cpp.llama_tokenize(self.vocab, data, len(data), ids, room, add, special)
        assert count >= 0
        return ids[:count]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens one by one, as llama.cpp's programs show it."""
        buffer, text = ctypes.create_string_buffer(1024), b""
        for token in ids:
            count = llama_cpp.llama_token_to_piece(self.vocab, token, buffer, 1024, 0, False)
            assert count >= 0
            text += buffer.raw[:count]
        return text.decode(errors="replace")

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of all tokens by one function of the library, which may change spaces."""
        tokens, room = (llama_cpp.llama_token * len(ids))(*ids), 64 * len(ids) + 64
        buffer = ctypes.create_string_buffer(room)
        arguments = (tokens, len(ids), buffer, room, False, False)
        count = llama_cpp.llama_detokenize(self.vocab, *arguments)
        assert count >= 0
        return buffer.raw[:count].decode(errors="replace")

    def ends_at(self, token: int) -> bool:
        return llama_cpp.llama_vocab_is_eog(self.vocab, token)

    def text_of(self, token: int) -> str:
        return llama_cpp.llama_vocab_get_text(self.vocab, token).decode()


def write_gguf(
    path: Path,
    fields: Mapping[str, Any],
    tensors: Mapping[str, Any] | None = None,
) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in fields.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# Tokenizers.


def demo(_: Path) -> Model:
    return Model(NANO, 512, "smollm", 0, (1, 2, 3))


def smollm2(_: Path) -> Model:
    if not (SMOLLM2 / "tokenizer.json").exists():
        pytest.skip(f"no {SMOLLM2}; see examples/fetch_smollm2.py")
    return Model(SMOLLM2, 49152, "smollm", 1, (2,))


def large(name: str) -> Path:
    if not (LARGE / name / "tokenizer.json").exists():
        pytest.skip(f"no tokenizer {name}: run tests/tokenizers.sh")
    return LARGE / name


def llama3(out: Path) -> Model:
    """MobileLLM-R1's tokenizer: that of Llama 3, which begins a text with a token."""
    content = json.loads((large("llama3") / "tokenizer.json").read_text())
    begin = "<|begin_of_text|>"
    added = processors.TemplateProcessing(f"{begin} $A", f"{begin} $A $B", [(begin, 128000)])
    steps = [processors.ByteLevel(trim_offsets=False), added]
    whole = Tokenizer.from_str(json.dumps(content))
    whole.post_processor = processors.Sequence(steps)
    whole.save(str(out / "tokenizer.json"))
    template = json.loads((NANO / "tokenizer_config.json").read_text())["chat_template"]
    config = {"bos_token": begin, "eos_token": "<|eot_id|>", "chat_template": template}
    (out / "tokenizer_config.json").write_text(json.dumps(config))
    return Model(out, 128256, "llama-bpe", 128000, (128001, 128008, 128009))


def qwen3(_: Path) -> Model:
    return Model(large("qwen3"), 151936, "qwen2", 151643, (151645, 151643))


def olmo2(_: Path) -> Model:
    """OLMo-2's tokenizer is that of GPT-3.5 with more added tokens, and splits in the same way."""
    return Model(large("gpt35turbo"), 100352, "dbrx", 100257, (100257,))


def trained(
    out: Path, steps: list[pre_tokenizers.PreTokenizer], *, ignore_merges: bool = False
) -> Tokenizer:
    """A tokenizer of 2,000 tokens, some of them added: two special ones, and one that is not."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<s>", "<e>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train([str(path) for path in SOURCES[:60]], trainer)
    tokenizer.add_tokens(["<think>"])
    out.mkdir(exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    return tokenizer


def bytes_of(expression: str = "", *, behavior: str = "isolated", invert: bool = False) -> Any:
    """ByteLevel, after a Split by an expression if there is one."""
    if not expression:
        return [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    split = pre_tokenizers.Split(Regex(expression), behavior, invert)
    return [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


def gpt2(out: Path) -> Model:
    trained(out, bytes_of())
    return Model(out, 2016, "gpt-2", 0, (1,))


def qwen3_5(out: Path) -> Model:
    trained(out, bytes_of(QWEN3_5))
    return Model(out, 2016, "qwen35", 0, (1,))


def both_added(out: Path) -> Model:
    """A tokenizer that adds a token before a text and one after it, and never uses its merges for a
    word that is a token."""
    tokenizer = trained(out, bytes_of(LLAMA3), ignore_merges=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A <e>", "<s> $A $B <e>", [("<s>", 0), ("<e>", 1)]
    )
    tokenizer.save(str(out / "tokenizer.json"))
    return Model(out, 2016, "llama-bpe", 0, (1,))


MAKERS = [demo, smollm2, llama3, qwen3, olmo2, gpt2, qwen3_5, both_added]


# Text.

SCRIPTS = (
    "Grüße e\u0301a\u0323\u0302 क्षत्रिय ภาษาไทย العَرَبِيَّة 你好，世界 日本語の 한국어 Ελληνικά "
    "русский עברית"
).split()
PIECES: list[Callable[[random.Random], str]] = [
    lambda r: chr(r.randrange(128)),
    lambda r: r.choice(" \n\t\r\v\f\x85\xa0\u2028\u3000") * r.randrange(1, 4),
    lambda r: r.choice("'s 'S 're 'RE 'll 'Ll 'd 'm 't 've 'x '' x'y".split()),
    lambda r: str(r.randrange(10 ** r.randrange(1, 9))),
    lambda r: r.choice(assigned()),
    lambda r: "".join(r.choices(assigned()[:500], k=4)),
    lambda r: r.choice(SCRIPTS),
    lambda r: r.choice("🙂 🇫🇷 👩\u200d👩\u200d👧 👍🏽 ½²Ⅷ① \u200f\ufeff \x00\x1b[0m ſİı".split()),
]  # fmt: skip


@cache
def assigned() -> list[str]:
    """Every character of Unicode 15, without private ones and halves of pairs."""
    places = (place for place in range(0x110000) if not any(place in new for new in NEW_CHARACTERS))
    return [c for c in map(chr, places) if unicodedata.category(c) not in ("Cn", "Cs", "Co")]


def random_lines(count: int, tokens: Sequence[str]) -> Iterator[str]:
    """Lines of characters of all kinds; every fourth one has special tokens in it."""
    chance = random.Random(7)
    for line in range(count):
        pieces = [chance.choice(PIECES)(chance) for _ in range(chance.randrange(1, 20))]
        if line % 4 == 0:
            for _ in range(3):
                pieces.insert(chance.randrange(len(pieces) + 1), chance.choice(tokens))
        yield "".join(pieces)


def lines_of(model: Model) -> list[str]:
    """10,000 lines: prose, sums in words, programs, and characters of all kinds.

    Prose and sums are WikiText-2 and GSM8K, or without these the pages of this repository.
    """
    if DATA.is_dir():
        problems = map(json.loads, (DATA / "gsm8k-train.jsonl").read_text().splitlines())
        prose = [
            *(DATA / "wikitext2-valid.txt").read_text().splitlines()[:2500],
            *[line for one in problems for line in _lines(one["question"], one["answer"])][:2500],
        ]
    else:
        prose = _lines(*(path.read_text() for path in PAGES))[:5000]
    tokens = [entry["content"] for entry in model.content["added_tokens"]]
    programs = _lines(*(path.read_text() for path in SOURCES))[: 7500 - len(prose)]
    return [*prose, *programs, *random_lines(2500, tokens)]


def _lines(*texts: str) -> list[str]:
    return [line for text in texts for line in text.splitlines()]


def excused(model: Model, line: str) -> bool:
    """Whether llama.cpp is known to differ: it does not compose characters, and where the
    vocabulary lacks a byte, it does not merge the bytes beside it."""
    composes = model.content["normalizer"] is not None
    if composes and unicodedata.normalize("NFC", line) != line:
        return True
    return not lacking_bytes(model.folder).isdisjoint(line.encode())


@cache
def lacking_bytes(folder: Path) -> Collection[int]:
    """The bytes without a token of their own."""
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    return {byte for byte, text in bytes_to_unicode().items() if text not in vocabulary}
