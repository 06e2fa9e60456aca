"""Text to tokens and back: chat templates, raw text, and streams of partial characters."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import NANO
from transformers import AutoTokenizer

from exporter.errors import InputError
from exporter.text.tokenizer import TextTokenizer, load_tokenizer

USER = "<|start_header_id|>user<|end_header_id|>\n\n"
ANSWER = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
TEXTS = [
    "plain words",
    "",
    " two  spaces\n\nand lines\t",
    "1234567890 + 2 = ?",
    "Grüße aus Köln, çà et là",
    "你好,世界。今日はいい天気",
    "🙂🇫🇷👩‍👩‍👧 family",
    "क्षत्रिय",
    "\u0000\u001f control",
    "e\u0301 combining",
]


def with_config(folder: Path, **changes: Any) -> TextTokenizer:
    """The demo tokenizer with keys of tokenizer_config.json changed; None removes a key."""
    folder.mkdir(exist_ok=True)
    shutil.copy(NANO / "tokenizer.json", folder)
    config = json.loads((NANO / "tokenizer_config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(kept))
    return load_tokenizer(folder)


# Prompts.


def test_a_prompt_becomes_one_turn_of_a_conversation(nano: Path) -> None:
    text = load_tokenizer(nano).prompt_text("What is 2 + 2?", raw=False)
    assert text == f"<|begin_of_text|>{USER}What is 2 + 2?{ANSWER}"


def test_a_system_text_goes_before_the_prompt(nano: Path) -> None:
    text = load_tokenizer(nano).prompt_text("Hi", raw=False, system="Be brief.")
    system = "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    assert text == f"<|begin_of_text|>{system}{USER}Hi{ANSWER}"


def test_a_raw_prompt_stays_as_it_is(nano: Path) -> None:
    assert load_tokenizer(nano).prompt_text("  Hi \n", raw=True) == "  Hi \n"


def test_special_tokens_of_the_template_become_one_token_each(nano: Path) -> None:
    tokenizer = load_tokenizer(nano)
    ids = tokenizer.encode(tokenizer.chat_text("Hi"))
    assert ids[:2] == [0, 4]
    assert ids.count(3) == 1


def test_without_a_template_the_prompt_stays_as_it_is(tmp_path: Path) -> None:
    tokenizer = with_config(tmp_path, chat_template=None)
    assert tokenizer.prompt_text("Hi", raw=False) == "Hi"


def test_without_a_template_a_system_text_is_refused(tmp_path: Path) -> None:
    tokenizer = with_config(tmp_path, chat_template=None)
    with pytest.raises(InputError) as raised:
        tokenizer.prompt_text("Hi", raw=False, system="Be brief.")
    assert str(tmp_path) in str(raised.value)
    assert "no chat template" in str(raised.value)
    assert "--raw" in raised.value.remedy


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no system turns') }}",
        "{% if %}",
        "{{ messages[0]['content'].missing.more }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ 1 + messages[0]['content'] }}",
        "{{ 1 / 0 }}",
        "{{ messages[7]['content'] }}",
        "{{ messages | no_such_filter }}",
        "{% set _ = messages.append(1) %}",
    ],
)
def test_a_template_that_cannot_be_rendered_is_refused(template: str, tmp_path: Path) -> None:
    tokenizer = with_config(tmp_path, chat_template=template)
    with pytest.raises(InputError) as raised:
        tokenizer.chat_text("Hi")
    assert f"{tmp_path}: chat template" in str(raised.value)
    assert "cannot be rendered" in str(raised.value)
    assert "--raw" in raised.value.remedy


def test_the_reason_that_a_template_gives_is_in_the_refusal(tmp_path: Path) -> None:
    tokenizer = with_config(tmp_path, chat_template="{{ raise_exception('only one turn') }}")
    with pytest.raises(InputError, match="only one turn"):
        tokenizer.chat_text("Hi")


#: Templates as they are found in models; each must give what transformers makes of it.
TEMPLATES = {
    "lines and blocks": "{% for m in messages %}\n  {% if true %}\n{{ m.role }}\n{% endif %}\n"
    "{% endfor %}\nend\n",
    "generation prompt": "{% if add_generation_prompt %}go{% else %}stay{% endif %}",
    "special tokens": "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% endfor %}{{ ns.n }}",
    "Llama 3: tools": "{% if not tools is defined %}{% set tools = none %}{% endif %}"
    "{% if tools is not none %}tools{% else %}none{% endif %}",
    "tools without a guard": "{% if tools is not none %}tools{% else %}none{% endif %}",
    "documents without a guard": "{% if documents is not none %}some{% else %}none{% endif %}",
    "break": "{% for m in messages %}{{ m.role }}{% break %}{% endfor %}",
    "JSON": "{{ messages[0] | tojson }}",
    "generation block": "{% generation %}{{ messages[0].content }}{% endgeneration %}",
    "a system turn asked for": "{% if messages[0].role == 'system' %}s{% else %}none{% endif %}",
}


@pytest.mark.parametrize("system", [None, "Be <b>brief</b> & 'kind'."], ids=["user", "system"])
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_is_rendered_as_in_transformers(
    template: str, system: str | None, tmp_path: Path
) -> None:
    ours = with_config(tmp_path, chat_template=template)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": "Grüße <1>"})
    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )
    assert ours.chat_text("Grüße <1>", system) == theirs


# Where templates and special tokens are found.


def test_a_template_file_goes_before_the_one_in_the_configuration(tmp_path: Path) -> None:
    with_config(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("file: {{ messages[0].content }}")
    assert load_tokenizer(tmp_path).chat_text("Hi") == "file: Hi"


def test_of_several_templates_the_one_named_default_is_taken(tmp_path: Path) -> None:
    named = [{"name": "rag", "template": "rag"}, {"name": "default", "template": "mine"}]
    assert with_config(tmp_path, chat_template=named).chat_text("Hi") == "mine"


def test_several_templates_without_a_default_are_none(tmp_path: Path) -> None:
    named = [{"name": "rag", "template": "rag"}]
    assert with_config(tmp_path, chat_template=named).chat_template is None


@pytest.mark.parametrize("template", [7, {"default": "x"}, ["x"], [{"name": "default"}]], ids=repr)
def test_a_template_that_is_no_text_is_refused(template: object, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"chat.template"):
        with_config(tmp_path, chat_template=template).chat_text("Hi")


def test_special_tokens_are_read_as_text_or_as_an_object(tmp_path: Path) -> None:
    tokenizer = with_config(
        tmp_path,
        bos_token={"content": "<a>", "lstrip": False},
        eos_token="<b>",
        pad_token=7,
        chat_template="{{ bos_token }}{{ eos_token }}{{ pad_token }}",
    )
    assert tokenizer.chat_text("Hi") == "<a><b>"


def test_a_folder_without_configuration_has_a_tokenizer_without_template(tmp_path: Path) -> None:
    shutil.copy(NANO / "tokenizer.json", tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.chat_template is None
    assert tokenizer.decode(tokenizer.encode("Hi")) == "Hi"


@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, "no such file"), (b"", "is not a tokenizer"), (b"{}", "is not a tokenizer"),
     (b"\xff", "is not a tokenizer")],
)  # fmt: skip
def test_a_folder_without_a_whole_tokenizer_is_refused(
    content: bytes | None, problem: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(InputError) as raised:
        load_tokenizer(tmp_path)
    assert "tokenizer.json" in raised.value.subject
    assert problem in raised.value.problem
    assert raised.value.remedy


# Tokens.


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_comes_back_from_its_tokens(text: str, nano: Path) -> None:
    tokenizer = load_tokenizer(nano)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_those_of_transformers(text: str, nano: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(nano)(text, add_special_tokens=False).input_ids
    assert load_tokenizer(nano).encode(text) == theirs


def test_special_tokens_are_left_out_of_decoded_text(nano: Path) -> None:
    tokenizer = load_tokenizer(nano)
    assert tokenizer.decode([0, *tokenizer.encode("Hi"), 3]) == "Hi"


# Streams.


@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_adds_up_to_the_decoded_text(text: str, nano: Path) -> None:
    tokenizer = load_tokenizer(nano)
    ids = tokenizer.encode(text)
    streamed = list(tokenizer.stream(ids))
    assert [token for token, _ in streamed] == ids
    assert "".join(part for _, part in streamed) == tokenizer.decode(ids) == text


def test_an_emoji_in_four_tokens_appears_whole_with_the_last(nano: Path) -> None:
    tokenizer = load_tokenizer(nano)
    ids = tokenizer.encode("🙂")
    assert len(ids) == 4
    assert [part for _, part in tokenizer.stream(ids)] == ["", "", "", "🙂"]


def test_a_stream_gives_each_text_before_it_asks_for_the_next_token(nano: Path) -> None:
    tokenizer, asked = load_tokenizer(nano), list[int]()

    def ids() -> Any:
        for token in tokenizer.encode("abc def"):
            asked.append(token)
            yield token

    for token, _ in tokenizer.stream(ids()):
        assert asked[-1] == token


def test_a_stream_has_no_special_tokens_in_its_text(nano: Path) -> None:
    tokenizer = load_tokenizer(nano)
    ids = [0, *tokenizer.encode("Hi"), 3, *tokenizer.encode("you")]
    assert "".join(part for _, part in tokenizer.stream(ids)) == "Hiyou"


def test_a_stream_of_any_tokens_is_the_decoded_text_up_to_an_unfinished_character(
    nano: Path,
) -> None:
    tokenizer, chance = load_tokenizer(nano), random.Random(0)
    held_back = 0
    for _ in range(300):
        ids = chance.choices(range(512), k=chance.randrange(1, 20))
        streamed = "".join(part for _, part in tokenizer.stream(ids))
        rest = tokenizer.decode(ids).removeprefix(streamed)
        assert streamed + rest == tokenizer.decode(ids)
        assert not rest.strip("\N{REPLACEMENT CHARACTER}"), ids
        held_back += bool(rest)
    assert 0 < held_back < 300
