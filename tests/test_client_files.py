"""The tokenizer's configuration for the clients of other languages."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import LLAMA4
from tiny import TEMPLATE, write_tiny_checkpoint

from exporter.errors import InputError
from exporter.model.checkpoint import special_tokens
from exporter.text.client_files import tokenizer_config
from exporter.text.tokenizer import load_tokenizer

TEXT = "Ada has 12 eggs."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_checkpoint(tmp_path / "model")


def of(folder: Path) -> dict[str, Any] | None:
    return tokenizer_config(folder, *special_tokens(folder, LLAMA4["vocab_size"]))


def found(folder: Path) -> dict[str, Any]:
    config = of(folder)
    assert config is not None
    return config


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def test_the_chat_template_of_a_file_of_its_own_is_inlined(folder: Path) -> None:
    write(folder / "tokenizer_config.json", {"chat_template": "of the configuration"})
    assert found(folder)["chat_template"] == "of the configuration"
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    assert found(folder)["chat_template"] == TEMPLATE


def test_the_default_of_several_templates_is_inlined(folder: Path) -> None:
    named = [{"name": "tools", "template": "a"}, {"name": "default", "template": "b"}]
    write(folder / "tokenizer_config.json", {"chat_template": named})
    assert found(folder)["chat_template"] == "b"
    write(folder / "tokenizer_config.json", {"chat_template": named[:1]})
    assert "chat_template" not in found(folder)


def test_special_tokens_are_text_from_whichever_file_names_them(folder: Path) -> None:
    write(folder / "tokenizer_config.json", {"bos_token": {"content": "a", "lstrip": False}})
    write(folder / "special_tokens_map.json", {"bos_token": "b", "unk_token": {"content": "c"}})
    config = found(folder)
    assert (config["bos_token"], config["unk_token"]) == ("a", "c")


def test_missing_tokens_are_those_of_the_ids_and_null_stays(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    write(folder / "tokenizer_config.json", {})
    config = found(folder)
    assert config["bos_token"] == tokenizer.text_of(0) == "<unk>"
    assert config["eos_token"] == config["pad_token"] == tokenizer.text_of(1)
    write(folder / "tokenizer_config.json", {"bos_token": None, "pad_token": "p"})
    config = found(folder)
    assert (config["bos_token"], config["pad_token"]) == (None, "p")


@pytest.mark.parametrize("given", ["TokenizersBackend", "OfNoClientTokenizer", None])
def test_transformers_encodes_as_we_do_whatever_class_was_named(
    given: str | None, folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    config = {"tokenizer_class": given, "eos_token": "!", "add_bos_token": True, "backend": "x"}
    write(folder / "tokenizer_config.json", config)
    config = found(folder)
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"backend", "add_bos_token"} & config.keys()
    write(folder / "tokenizer_config.json", config)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs(TEXT).input_ids == load_tokenizer(folder).encode(TEXT)
    assert theirs.eos_token == "!"


def test_the_list_of_special_tokens_has_the_name_that_every_client_reads(folder: Path) -> None:
    write(folder / "tokenizer_config.json", {"extra_special_tokens": ["a"], "model_max_length": 9})
    config = found(folder)
    assert config["additional_special_tokens"] == ["a"]
    assert "extra_special_tokens" not in config
    assert config["model_max_length"] == 9


def test_a_folder_without_a_tokenizer_has_no_configuration_for_one(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert of(folder) is None


def test_what_cannot_be_read_is_an_error_with_the_file(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"bos_token": ')
    with pytest.raises(InputError, match=r"tokenizer_config\.json"):
        of(folder)
