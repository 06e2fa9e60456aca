"""Documents from text, JSONL and parquet files, and the errors for files without documents."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from conftest import NANO
from pyarrow import parquet

from exporter.errors import InputError
from exporter.text.documents import Document, Message, read_documents
from exporter.text.tokenizer import load_tokenizer

PAIR = (Message("user", "2 + 2?"), Message("assistant", "4"))


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def table(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def test_a_plain_file_is_one_document_to_the_last_byte(tmp_path: Path) -> None:
    content = " Grüße\r\n\r\nand lines \t\n"
    (tmp_path / "a.md").write_bytes(content.encode())
    assert read_documents(tmp_path / "a.md") == [content]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfwords")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "words"}\n')
    assert read_documents(tmp_path / "a.txt") == read_documents(tmp_path / "a.jsonl") == ["words"]


@pytest.mark.parametrize(
    ("row", "document"),
    [
        ({"text": "words", "prompt": "p", "completion": "c"}, "words"),
        ({"prompt": "2 + 2?", "completion": "4"}, PAIR),
        ({"question": "2 + 2?", "answer": "4"}, PAIR),
        (
            {"messages": [{"role": "user", "content": "2 + 2?"},
                          {"role": "assistant", "content": "4"}]},
            PAIR,
        ),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
@pytest.mark.parametrize("suffix", ["jsonl", "json", "ndjson", "parquet"])
def test_a_row_is_a_text_or_a_conversation(
    suffix: str, row: dict[str, Any], document: Document, tmp_path: Path
) -> None:
    path = tmp_path / f"rows.{suffix}"
    path = table(path, [row, row]) if suffix == "parquet" else jsonl(path, row, row)
    assert read_documents(path) == [document, document]


def test_a_field_can_be_named(tmp_path: Path) -> None:
    rows = [{"text": "no", "body": "yes"}, {"text": "no", "body": "and yes"}]
    assert read_documents(jsonl(tmp_path / "a.jsonl", *rows), "body") == ["yes", "and yes"]
    assert read_documents(table(tmp_path / "a.parquet", rows), "body") == ["yes", "and yes"]


def test_empty_rows_and_empty_lines_are_left_out(tmp_path: Path) -> None:
    """WikiText's rows are lines, many of them empty."""
    rows = [{"text": ""}, {"text": "a\n"}, {"text": ""}]
    assert read_documents(table(tmp_path / "a.parquet", rows)) == ["a\n"]
    (tmp_path / "a.jsonl").write_text('\n{"text": "a"}\r\n\n')
    assert read_documents(tmp_path / "a.jsonl") == ["a"]


def test_only_a_line_feed_ends_a_line_of_jsonl(tmp_path: Path) -> None:
    text = "one\u2028two\x85three"
    content = json.dumps({"text": text}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text(content, encoding="utf-8")
    assert read_documents(tmp_path / "a.jsonl") == [text]


def test_a_conversation_is_rendered_by_the_template_of_the_model() -> None:
    text = load_tokenizer(NANO).document_text(PAIR)
    head = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>"
    expected = head.format("user", "2 + 2?") + head.format("assistant", "4")
    assert text == f"<|begin_of_text|>{expected}"


def test_plain_text_is_not_rendered() -> None:
    assert load_tokenizer(NANO).document_text(" words\n") == " words\n"


BAD: dict[str, tuple[str, bytes, str | None, list[str]]] = {
    "empty text": ("a.txt", b"", None, ["a.txt", "is empty", "some text"]),
    "empty JSONL": ("a.jsonl", b"", None, ["a.jsonl", "is empty"]),
    "only spaces": ("a.txt", b" \n \n", None, ["a.txt", "holds no text"]),
    "only empty rows": ("a.jsonl", b'{"text": ""}\n', None, ["a.jsonl", "holds no text"]),
    "only empty lines": ("a.jsonl", b"\n\n", None, ["a.jsonl", "holds no text"]),
    "Latin-1": ("a.txt", "Köln".encode("latin-1"), None, ["a.txt", "0xf6", "UTF-8"]),
    "UTF-16": ("a.jsonl", '{"text": "a"}'.encode("utf-16"), None, ["0xff", "UTF-8"]),
    "not JSON": ("a.jsonl", b'{"text": "a"}\n{"text"\n', None, ["line 2", "not valid JSON"]),
    "too deep": ("a.jsonl", b"[" * 100_000, None, ["line 1", "limit of 64 levels"]),
    "a list": ("a.json", b'[{"text": "a"}]', None, ["line 1", "a list", "one object a line"]),
    "no field": (
        "a.jsonl", b'{"text": "a"}\n\n{"body": "b"}\n', None,
        ["line 3", "'text'", "'prompt' and 'completion'", "--field", "'body'"],
    ),
    "half a pair": ("a.jsonl", b'{"prompt": "a"}\n', None, ["line 1", "'completion'", "'prompt'"]),
    "field not there": (
        "a.jsonl", b'{"text": "a"}\n', "body", ["line 1", "no field 'body'", "'text'"]
    ),
    "field of plain text": ("a.txt", b"words", "body", ["--field", "a.txt", "plain text"]),
    "a number": ("a.jsonl", b'{"text": 7}\n', None, ["line 1: text", "7 is not text"]),
    "null": ("a.jsonl", b'{"text": null}\n', None, ["line 1: text", "None is not text"]),
    "half a character": ("a.jsonl", b'{"text": "\\ud800"}', None, ["line 1", "surrogates not"]),
    "messages of text": ("a.jsonl", b'{"messages": ["a"]}', None, ["'a' is not a message"]),
    "no messages": ("a.jsonl", b'{"messages": []}', None, ["line 1: messages", "no messages"]),
    "message without text": (
        "a.jsonl", b'{"messages": [{"role": "user", "content": null}]}', None,
        ["messages: content", "None is not text"],
    ),
    "not parquet": ("a.parquet", b"words", None, ["a.parquet", "as parquet", "again"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_refused_with_its_line(name: str, tmp_path: Path) -> None:
    file, content, field, said = BAD[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError) as raised:
        read_documents(tmp_path / file, field)
    assert [text for text in said if text not in str(raised.value)] == []


def test_a_parquet_row_without_text_is_named(tmp_path: Path) -> None:
    path = table(tmp_path / "a.parquet", [{"text": "a"}, {"text": None}])
    with pytest.raises(InputError, match=r"row 2: text: None is not text"):
        read_documents(path)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_file_that_is_not_there_is_said_so(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_documents(tmp_path / name)
