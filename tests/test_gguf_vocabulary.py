"""The tokenizer in a GGUF file gives llama.cpp the same token ids as ours has."""

import json
import shutil
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import run
from conftest import NANO
from tiny import write_tiny_checkpoint
from tokenizers import Tokenizer
from vocabularies import (
    CONTROL_BY_NAME,
    MAKERS,
    Model,
    Vocabulary,
    assigned,
    bytes_of,
    config_of,
    excused,
    gpt2,
    lines_of,
    llama3,
    llama_cpp,
    qwen3,
    smollm2,
    trained,
    write_gguf,
)

from exporter.backends.gguf.vocabulary import Fields, check_tokenizer, tokenizer_fields
from exporter.errors import InputError
from exporter.text.documents import Message
from exporter.text.tokenizer import TextTokenizer, load_tokenizer

CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Pair:
    """One tokenizer, as ours and in llama.cpp."""

    model: Model
    fields: Fields
    ours: TextTokenizer
    theirs: Vocabulary

    @cached_property
    def encoded(self) -> list[tuple[str, list[int]]]:
        """10,000 lines with our token ids, without those that llama.cpp is known to read in another
        way: at most 5 % of them."""
        lines = lines_of(self.model)
        assert len(lines) == 10_000
        found = [(line, self.ours.encode(line)) for line in lines if not excused(self.model, line)]
        assert len(found) > 9_500
        return found


@pytest.fixture(scope="module", params=MAKERS, ids=lambda maker: maker.__name__)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("tokenizer")
    model: Model = request.param(folder)
    fields = model.fields
    theirs = Vocabulary(folder / "vocabulary.gguf", fields)
    return Pair(model, fields, load_tokenizer(model.folder), theirs)


# Token ids.


def test_ten_thousand_lines_have_the_same_token_ids_in_llama_cpp(pair: Pair) -> None:
    assert [line for line, ids in pair.encoded if pair.theirs.encode(line) != ids] == []


def test_joined_lines_have_the_same_token_ids(pair: Pair) -> None:
    text = "\n".join(line for line, _ in pair.encoded)
    assert pair.theirs.encode(text) == pair.ours.encode(text)


def test_characters_of_unicode_15_are_split_in_the_same_way(pair: Pair) -> None:
    """Each one between letters, digits, spaces and signs, where its category decides. Of letters
    without a case, mostly those of Chinese and Korean, it is one in 16."""
    letters = [c for c in assigned() if unicodedata.category(c) == "Lo"]
    others = [c for c in assigned() if unicodedata.category(c) != "Lo"]
    texts = [f"a{c}b1{c}2  {c} {c}{c}!{c}\n{c}\n'{c}s" for c in (*others, *letters[::16])]
    compared = [text for text in texts if not excused(pair.model, text)]
    assert len(compared) > 20_000
    for start in range(0, len(compared), 64):
        text = "\n".join(compared[start : start + 64])
        assert pair.theirs.encode(text) == pair.ours.encode(text)


def test_special_tokens_can_be_read_as_text(pair: Pair) -> None:
    """As `tokenizers` does it with `encode_special_tokens`."""
    ours = Tokenizer.from_file(str(pair.model.folder / "tokenizer.json"))
    ours.encode_special_tokens = True
    lines = [line for line, _ in pair.encoded[-2_000:]]
    compared = [line for line in lines if not any(name in line for name in CONTROL_BY_NAME)]
    assert len(compared) > 1_500
    expected = [one.ids for one in ours.encode_batch(compared, add_special_tokens=False)]
    assert [pair.theirs.encode(line, special=False) for line in compared] == expected


def test_the_same_tokens_are_added_to_a_text(pair: Pair) -> None:
    for text in ("What is 2 + 2?", " ", ""):
        assert pair.theirs.encode(text, add=True) == pair.ours.encode(text, special_tokens=True)


def test_the_name_of_the_split_is_the_one_that_the_expressions_have(pair: Pair) -> None:
    assert pair.fields["tokenizer.ggml.pre"] == pair.model.pre


def test_another_split_gives_other_token_ids(tmp_path: Path) -> None:
    """The comparison fails on a file that names a way to split that is not the tokenizer's."""
    model = gpt2(tmp_path)
    ours, lines = load_tokenizer(model.folder), lines_of(model)[::10]
    for name in ("smollm", "qwen2", "llama-bpe"):
        theirs = Vocabulary(tmp_path / name, model.fields | {"tokenizer.ggml.pre": name})
        assert sum(theirs.encode(line) != ours.encode(line) for line in lines) > 50


@pytest.mark.parametrize(
    ("expression", "behavior", "invert", "pre"),
    [(CL100K, "isolated", False, "dbrx"), (CL100K, "removed", True, "dbrx"),
     (GPT2, "isolated", False, "gpt-2"), (GPT2, "isolated", True, "gpt-2")],
)  # fmt: skip
def test_other_spellings_of_an_expression_are_the_same_split(
    expression: str, behavior: str, invert: bool, pre: str, tmp_path: Path
) -> None:
    trained(tmp_path, bytes_of(expression, behavior=behavior, invert=invert))
    model = Model(tmp_path, 2016, pre)
    assert model.fields["tokenizer.ggml.pre"] == pre
    ours, theirs = load_tokenizer(tmp_path), Vocabulary(tmp_path / "v.gguf", model.fields)
    lines = lines_of(model)[::5]
    assert [line for line in lines if theirs.encode(line) != ours.encode(line)] == []


# Where llama.cpp differs.


def test_llama_cpp_reads_composed_text_as_a_normalizer_would_compose_it(tmp_path: Path) -> None:
    model = qwen3(tmp_path)
    ours, theirs = load_tokenizer(model.folder), Vocabulary(tmp_path / "v.gguf", model.fields)
    others = [line for line in lines_of(model) if excused(model, line)]
    assert len(others) > 50
    assert any(theirs.encode(line) != ours.encode(line) for line in others)
    for line in others:
        assert theirs.encode(unicodedata.normalize("NFC", line)) == ours.encode(line)


def test_llama_cpp_does_not_merge_across_a_byte_that_the_vocabulary_lacks(tmp_path: Path) -> None:
    model = smollm2(tmp_path)
    ours, theirs = load_tokenizer(model.folder), Vocabulary(tmp_path / "v.gguf", model.fields)
    assert theirs.encode("(\x04)") == ours.encode("(") + ours.encode(")")
    assert ours.encode("(\x04)") == ours.encode("()") != theirs.encode("(\x04)")


def test_llama_cpp_takes_the_longest_of_overlapping_tokens(tmp_path: Path) -> None:
    tokenizer = trained(tmp_path, bytes_of())
    tokenizer.add_tokens(["||a||", "||bb||"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    fields = tokenizer_fields(tmp_path, config_of(2016), 0, (1,))
    theirs = Vocabulary(tmp_path / "v.gguf", fields)
    a, bb = ours.encode("||a||||bb||")
    assert theirs.encode("||a||||bb||") == [a, bb]
    assert ours.encode("||a||bb||") == [a, *ours.encode("bb||")]
    assert theirs.encode("||a||bb||") == [*ours.encode("||a"), bb]


def test_llama_cpp_does_not_know_the_letters_and_digits_of_unicode_16(tmp_path: Path) -> None:
    model = llama3(tmp_path)
    ours, theirs = load_tokenizer(tmp_path), Vocabulary(tmp_path / "v.gguf", model.fields)
    assert theirs.encode("  \U00010d40") != ours.encode("  \U00010d40")
    assert theirs.encode("  \u0664") == ours.encode("  \u0664")


# Text of token ids.


def test_the_text_of_tokens_is_the_same(pair: Pair) -> None:
    for line, ids in pair.encoded:
        if not any(name in line for name in CONTROL_BY_NAME):
            assert pair.theirs.decode(ids) == pair.ours.decode(ids)


def test_single_tokens_have_the_same_text(pair: Pair) -> None:
    size = pair.model.vocab_size
    for token in {*range(0, size, max(1, size // 500)), *range(size - 20, size)}:
        if pair.theirs.text_of(token) not in CONTROL_BY_NAME:
            assert pair.theirs.decode([token]) == pair.ours.decode([token])


def test_detokenizing_at_once_removes_spaces_for_some_splits(pair: Pair) -> None:
    """`llama_detokenize` does so for these names; the programs of llama.cpp do not use it."""
    text = "Wait , what ? It 's 3 . Yes !"
    found = pair.theirs.detokenize(pair.ours.encode(text))
    cleaned = pair.model.pre in ("gpt-2", "llama-bpe", "dbrx")
    assert found == ("Wait, what? It's 3. Yes!" if cleaned else text)


# Ends.


def test_llama_cpp_ends_at_the_tokens_that_end_a_text(pair: Pair) -> None:
    assert all(map(pair.theirs.ends_at, pair.model.ends))


def test_more_ends_have_fields_of_their_own(tmp_path: Path) -> None:
    trained(tmp_path, bytes_of())
    ends = (1, 50, 60)
    fields = tokenizer_fields(tmp_path, config_of(2016), 0, ends)
    names = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    assert [fields[name] for name in names] == [1, 50, 60]
    theirs = Vocabulary(tmp_path / "v.gguf", fields)
    assert [token for token in range(2016) if theirs.ends_at(token)] == [1, 50, 60]
    with pytest.raises(InputError, match=r"eos_token_id has 4 tokens, more than llama\.cpp can"):
        tokenizer_fields(tmp_path, config_of(2016), 0, (*ends, 70))


# The chat template.

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 2?\n"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": " Why? <b>&amp;</b> 你好"},
]


def test_llama_cpp_has_the_chat_template_and_renders_the_same_text(pair: Pair) -> None:
    found = llama_cpp.llama_model_chat_template(pair.theirs.model, None)
    expected = pair.ours.chat_template
    if expected is None:
        assert found is None
        return
    assert found.decode() == expected
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    begin = llama_cpp.llama_vocab_bos(pair.theirs.vocab)
    end = llama_cpp.llama_vocab_eos(pair.theirs.vocab)
    formatter = Jinja2ChatFormatter(
        found.decode(), pair.theirs.text_of(end), pair.theirs.text_of(begin)
    )
    messages = [Message(**message) for message in CONVERSATION]
    ours = pair.ours.conversation_text(messages, to_be_answered=True)
    assert formatter(messages=CONVERSATION).prompt == ours


# What is refused.

Change = Callable[[dict[str, Any]], object]


def changed(folder: Path, change: Change) -> Path:
    """The demo's folder without weights, with a change of its tokenizer.json."""
    content = json.loads((NANO / "tokenizer.json").read_text())
    change(content)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        shutil.copy(NANO / name, folder)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def with_split(**parts: Any) -> Change:
    return lambda content: content["pre_tokenizer"]["pretokenizers"][0].update(parts)


def with_part(name: str, **part: Any) -> Change:
    return lambda content: content.update({name: part})


def with_model(**parts: Any) -> Change:
    return lambda content: content["model"].update(parts)


def with_added(**parts: Any) -> Change:
    return lambda content: content["added_tokens"][0].update(parts)


def without_a_byte(content: dict[str, Any]) -> None:
    content["model"]["unk_token"] = "a"
    del content["model"]["vocab"]["z"]


def with_merge(merge: object) -> Change:
    return lambda content: content["model"]["merges"].append(merge)


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
TEMPLATE = {"type": "TemplateProcessing", "special_tokens": {"<x>": {"ids": [0, 1]}}}
TEXT, START = {"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "<x>"}}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (with_model(type="WordLevel"), "model: 'WordLevel' is not a byte-level BPE"),
        (with_model(type="Unigram"), "model: 'Unigram' is not a byte-level BPE"),
        (with_part("model"), "model.vocab: holds no tokens"),
        (lambda content: content.update(model=3), "model: 3 is not a byte-level BPE"),
        (with_model(dropout=0.1), "model.dropout: is not supported"),
        (with_model(byte_fallback=True), "model.byte_fallback: is not supported"),
        (with_model(end_of_word_suffix="</w>"), "model.end_of_word_suffix: is not supported"),
        (with_model(ignore_merges=True), "and ignore_merges true, which llama.cpp does not"),
        (with_model(vocab={"a": -1}), "'a' has the id -1"),
        (with_model(vocab={"a": True}), "'a' has the id True"),
        (with_model(vocab={"a": 0, "b": 0}), "gives one id to two tokens"),
        (without_a_byte, "model.unk_token: stands for 1 bytes that the vocabulary lacks"),
        (with_split(individual_digits=False), "which llama.cpp does not have"),
        (with_split(type="Punctuation"), "'Punctuation' is not supported by llama.cpp"),
        (with_split(type="Split", pattern={"String": " "}), "{'String': ' '} is no expression"),
        (
            with_split(type="Split", pattern={"Regex": "x"}, behavior="Isolated"),
            "splits text by ['x', ",
        ),
        (
            with_split(type="Split", pattern={"Regex": GPT2}, behavior="MergedWithNext"),
            "a Split that is 'MergedWithNext' is not supported",
        ),
        (
            with_split(type="Split", pattern={"Regex": GPT2}, behavior="Removed"),
            "a Split that is 'Removed' is not supported",
        ),
        (
            with_split(type="Split", pattern={"Regex": r"\p{N}"}, behavior="Removed", invert=True),
            "a Split that is 'Removed' is not supported",
        ),
        (with_split(**BYTES), "does not end with its only ByteLevel"),
        (with_part("pre_tokenizer", **BYTES), "splits text by [], which llama.cpp does not have"),
        (with_part("pre_tokenizer", type="ByteLevel"), "add_prefix_space is not supported"),
        (with_part("pre_tokenizer", type="Metaspace"), "does not end with its only ByteLevel"),
        (lambda content: content.pop("pre_tokenizer"), "None does not split text into bytes"),
        (with_part("pre_tokenizer", type="Sequence"), "None does not split text into bytes"),
        (with_part("normalizer", type="Lowercase"), "normalizer: 'Lowercase' is not llama.cpp's"),
        (with_part("decoder", type="Metaspace"), "decoder: 'Metaspace' is not llama.cpp's"),
        (lambda content: content.pop("decoder"), "decoder: None is not llama.cpp's"),
        (with_part("post_processor", type="BertProcessing"), "'BertProcessing' is not llama.cpp's"),
        (
            with_part("post_processor", **TEMPLATE, single=[START, TEXT]),
            "post_processor: 'TemplateProcessing' is not llama.cpp's",
        ),
        (
            with_part("post_processor", **TEMPLATE, single=[TEXT, TEXT]),
            "post_processor: 'TemplateProcessing' is not llama.cpp's",
        ),
        (with_part("truncation", max_length=9), "truncation: changes the length of texts"),
        (with_added(lstrip=True), "'<|begin_of_text|>' depends on what is beside it"),
        (with_added(id=7), "'<|begin_of_text|>' has the id 7, not 0"),
        (with_added(content="new"), "'new' has the id 0, not 512"),
        (with_added(content=5), "is no token of its own"),
        (lambda content: content.update(added_tokens=[3]), "3 is no token of its own"),
        (with_merge("a"), "'a' does not merge two tokens"),
        (with_merge(["q", "zzz"]), "['q', 'zzz'] does not merge two tokens"),
        (with_merge(["a", 1]), "['a', 1] does not merge two tokens"),
        (
            lambda content: content["model"]["merges"].append(content["model"]["merges"][0]),
            "occurs twice",
        ),
        (
            lambda content: content["model"]["vocab"].update(much=512),
            "token 512 is not one of the model's 512",
        ),
    ],
)
def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(
    change: Change, problem: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as refused:
        check_tokenizer(changed(tmp_path, change))
    assert problem in str(refused.value)
    assert str(refused.value).startswith(str(tmp_path))
    assert refused.value.remedy


def places(value: Any, found: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all values, of long lists and objects only the first ones."""
    yield found
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(entries)[:12]:
        yield from places(inner if isinstance(inner, (dict, list)) else [], (*found, key))


@pytest.mark.parametrize("value", [None, -1, "", True, [], {}, [[]], [{"type": []}]], ids=repr)
def test_any_value_at_any_place_is_read_or_refused(value: Any, tmp_path: Path) -> None:
    content = json.loads((NANO / "tokenizer.json").read_text())
    post = {"type": "Sequence", "processors": [TEMPLATE | {"single": [START, TEXT]}]}
    original = json.dumps({"whole": content | {"post_processor": post}})
    changed(tmp_path, lambda _: None)
    refused, tried = 0, list(places(json.loads(original)))[2:]
    for *way, last in tried:
        whole = inner = json.loads(original)
        for key in way:
            inner = inner[key]
        inner[last] = value
        (tmp_path / "tokenizer.json").write_text(json.dumps(whole["whole"]))
        try:
            check_tokenizer(tmp_path)
        except InputError:
            refused += 1
    assert len(tried) > 100
    assert refused > 20


def test_the_unchanged_tokenizer_is_not_refused(tmp_path: Path) -> None:
    check_tokenizer(changed(tmp_path, lambda content: None))


def test_a_tokenizer_of_words_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_tiny_checkpoint(tmp_path / "tiny")
    recipe, out = tmp_path / "tiny-gguf.yaml", tmp_path / "out"
    settings = "{linear: int4-g32, embedding: int8}"
    recipe.write_text(
        f"model: a/b\nquantization: {settings}\nmax_context: 64\ntargets: [{{target: gguf}}]\n"
    )
    command = ["export", recipe, "--checkpoint", checkpoint, "-o", out]
    refused = run(capsys, *command)
    assert refused.code == 2
    assert "model: 'WordLevel' is not a byte-level BPE. Leave the target gguf out" in refused.err
    assert not out.exists()
    (checkpoint / "tokenizer.json").unlink()
    made = run(capsys, *command)
    assert made.code == 0, made.err + made.out


# A file without a vocabulary.


def test_llama_cpp_runs_a_file_without_vocabulary_on_token_ids(tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        f"llama.{key}": value
        for key, value in {
            "vocab_size": 96, "context_length": 64, "embedding_length": 64, "block_count": 1,
            "feed_forward_length": 96, "attention.head_count": 4, "rope.dimension_count": 16,
            "attention.layer_norm_rms_epsilon": 1e-5,
        }.items()
    }  # fmt: skip
    fields |= tokenizer_fields(tmp_path, config_of(96), 0, (1,))
    assert fields["tokenizer.ggml.model"] == "none"
    shapes = {"attn_norm": 64, "ffn_norm": 64, "attn_q": (64, 64), "attn_k": (64, 64),
              "attn_v": (64, 64), "attn_output": (64, 64), "ffn_gate": (96, 64),
              "ffn_up": (96, 64), "ffn_down": (64, 96)}  # fmt: skip
    rng = np.random.default_rng(0)
    named = {f"blk.0.{name}.weight": shape for name, shape in shapes.items()}
    named |= {"token_embd.weight": (96, 64), "output_norm.weight": 64}
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in named.items()}
    write_gguf(tmp_path / "model.gguf", fields, tensors)
    parameters = llama_cpp.llama_model_default_params()
    parameters.use_extra_bufts = False  # see exporter/backends/gguf/runtime.py
    model = llama_cpp.llama_model_load_from_file(bytes(tmp_path / "model.gguf"), parameters)
    assert model
    assert llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model)) == 96
    context = llama_cpp.llama_init_from_model(model, llama_cpp.llama_context_default_params())
    tokens = (llama_cpp.llama_token * 3)(5, 95, 7)
    assert llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, 3)) == 0
    logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), (96,))
    assert np.isfinite(logits).all()
    assert len(set(logits.tolist())) > 90
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
