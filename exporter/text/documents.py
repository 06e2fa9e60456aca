"""Read texts and conversations from local files: plain text, JSONL and parquet.

    mobilellm evaluate build/nano --data problems.jsonl

A plain text file is one document. In JSONL and parquet each row is one: the text in its field
`text`, the conversation in `messages`, or a prompt and its answer (`prompt` and `completion`, or
`question` and `answer`). Files are UTF-8.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from exporter.errors import InputError, short
from exporter.foreign import JSON_BYTES, open_regular, parse_json, read_bytes

#: Fields that hold the document of a row; the first one that the row has counts.
TEXT_FIELDS = ("text", "messages")
#: Fields that hold a prompt and its answer, where none of those is there.
PAIRS = (("prompt", "completion"), ("question", "answer"))
#: Also .json: in most published data sets it holds one object a line.
JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")

#: The largest data file, and the longest line of JSONL, in bytes.
DATA_BYTES, LINE_BYTES = 256 << 20, JSON_BYTES
#: How many rows of a parquet file are decoded at once; text that repeats stays compressed.
_PARQUET_ROWS = 1024
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

Row = Mapping[str, object]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `role` is system, user or assistant."""

    role: str
    content: str


#: Plain text, or a conversation that the tokenizer's template turns into text.
Document = str | tuple[Message, ...]


def read_documents(path: Path, field: str | None = None) -> list[Document]:
    """All documents of a file that are not empty. `field` names the field to read of each row.

    Raises InputError, with the line or row, for text that is not UTF-8, rows that are not JSON
    objects or lack the field, and files without text.
    """
    if not is_table(path):
        if field is not None:
            raise InputError(
                path,
                f"is plain text and has no field {field!r}",
                "Leave --field (in a recipe: field) out, or give JSONL",
            )
        documents: list[Document] = [_text(path)]
    else:
        documents = [_document(row, place, field) for place, row in read_rows(path)]
    found = [document for document in documents if not isinstance(document, str) or document]
    if not any(not isinstance(document, str) or document.strip() for document in found):
        raise InputError(path, "holds no text", "Give a file with text")
    return found


def is_table(path: Path) -> bool:
    """Whether the file has rows with fields, which its suffix tells."""
    return path.suffix.lower() in (*JSONL_SUFFIXES, ".parquet")


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Each row of a JSONL or parquet file, with its place in the file for error messages.

    Raises InputError with that place.
    """
    if path.suffix.lower() == ".parquet":
        yield from _parquet_rows(path)
        return
    if path.suffix.lower() not in JSONL_SUFFIXES:
        raise InputError(path, "has no rows", f"Give {', '.join(JSONL_SUFFIXES)} or .parquet")
    with open_regular(path, DATA_BYTES) as file:
        number = 0
        # Only a line feed ends a line: JSON may hold the other characters that Python splits at.
        while line := file.readline(LINE_BYTES + 1):
            number += 1
            place = f"{path}: line {number}"
            if len(line) > LINE_BYTES:
                problem = f"is longer than the limit of {LINE_BYTES:,} bytes"
                raise InputError(place, problem, "Give one object a line")
            line = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
            if not line.strip():
                continue
            row = parse_json(line, place, "Give one object a line")
            if not isinstance(row, dict):
                raise InputError(
                    place, f"holds a {type(row).__name__}, not an object", "Give one object a line"
                )
            yield place, row
    if not number:
        raise InputError(path, "is empty", "Give a file with some text")


def text_field(row: Row, place: str, names: Sequence[str]) -> str:
    """The first of the fields `names` that the row has. Raises InputError where it is not text."""
    for name in names:
        if name in row:
            return _string(row[name], f"{place}: {name}")
    raise InputError(
        place, f"has no field {' or '.join(map(repr, names))}", f"Its fields: {_fields(row)}"
    )


def _document(row: Row, place: str, field: str | None) -> Document:
    if field is not None and field not in row:
        raise InputError(
            place, f"has no field {field!r}", f"Its fields: {_fields(row)}"
        )  # fmt: skip
    for name in (field,) if field is not None else TEXT_FIELDS:
        if name in row:
            value, where = row[name], f"{place}: {name}"
            return _messages(value, where) if isinstance(value, list) else _string(value, where)
    for prompt, answer in PAIRS:
        if prompt in row and answer in row:
            return (
                Message("user", _string(row[prompt], f"{place}: {prompt}")),
                Message("assistant", _string(row[answer], f"{place}: {answer}")),
            )
    pairs = ", or ".join(f"{prompt!r} and {answer!r}" for prompt, answer in PAIRS)
    raise InputError(
        place,
        f"has no field 'text' or 'messages', nor {pairs}",
        f"Name one with --field (in a recipe: field); its fields: {_fields(row)}",
    )


def _messages(value: Sequence[object], where: str) -> tuple[Message, ...]:
    messages = list[Message]()
    for entry in value:
        if not isinstance(entry, dict) or not {"role", "content"} <= entry.keys():
            raise InputError(
                where, f"{short(entry)} is not a message", "Give objects with 'role' and 'content'"
            )
        role, content = (_string(entry[key], f"{where}: {key}") for key in ("role", "content"))
        messages.append(Message(role, content))
    if not messages:
        raise InputError(where, "holds no messages", "Give one or more, or leave the row out")
    return tuple(messages)


def _string(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise InputError(where, f"{short(value)} is not text", "Give a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can hold half of a surrogate pair
        raise InputError(where, f"is not Unicode ({error.reason})", "Correct the text") from error
    return value


def _fields(row: Row) -> str:
    return ", ".join(map(short, row)) or "none"


def _text(path: Path) -> str:
    """The text of a file, without a byte order mark."""
    try:
        text = read_bytes(path, DATA_BYTES).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(path, f"cannot be read as text ({error})", "Give a UTF-8 file") from error
    if not text:
        raise InputError(path, "is empty", "Give a file with some text")
    return text


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number, size = 0, 0
    try:
        with open_regular(path, DATA_BYTES) as opened, ParquetFile(opened) as file:
            for batch in file.iter_batches(_PARQUET_ROWS):
                for index in range(batch.num_rows):
                    number += 1
                    (row,) = batch.slice(index, 1).to_pylist()
                    size += _characters(row)  # a file of kilobytes can hold gigabytes
                    if size > DATA_BYTES:
                        problem = f"exceeds the limit of {DATA_BYTES:,} characters in all rows"
                        raise InputError(f"{path}: row {number}", problem, "Give a smaller file")
                    yield f"{path}: row {number}", row
    except (ArrowException, OSError) as error:
        raise InputError(
            path, f"cannot be read as parquet ({error})", "Get the file again"
        ) from error


def _characters(value: object) -> int:
    """The characters of all text in a row."""
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    if isinstance(value, list):
        return sum(map(_characters, value))
    return len(value) if isinstance(value, str) else 0
