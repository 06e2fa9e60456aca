"""Files of folders that are not ours: what may be read of them, and with which limits."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from exporter import foreign
from exporter.errors import InputError, printable, short
from exporter.foreign import (
    DEPTH,
    DIGITS,
    differing_files,
    inside,
    parse_json,
    present,
    read_bytes,
    read_json,
)

Make = Callable[[Path, Path], object]


def outside(tmp_path: Path) -> Path:
    """A file that lies beside the folder."""
    secret = tmp_path / "secret"
    secret.write_text('{"secret": 1}')
    return secret


def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    return made


# Names that a foreign text gives.


@pytest.mark.parametrize("name", ["a", "a.json", "a/b/c", "model-1-of-2.safetensors", "ü", ".a"])
def test_a_plain_name_is_a_file_of_the_folder(name: str, tmp_path: Path) -> None:
    assert inside(tmp_path, name) == tmp_path / name


@pytest.mark.parametrize(
    "name",
    [
        *("", "/", "/etc/passwd", "..", "../secret", "a/../../secret", "a/./b", ".", "a//b", "a/"),
        *("a\x00b", "a\nb", "\x1b[2J", "\u202egpj", "\udcff", "a\\b", "ab" * 200, "a/" * 600 + "a"),
        *(None, 7, ["a"], {"a": 1}, True),
    ],
    ids=ascii,
)
def test_any_other_name_is_refused(name: object, tmp_path: Path) -> None:
    with pytest.raises(InputError) as raised:
        inside(tmp_path, name)
    assert "is not the plain name of a file inside this folder" in str(raised.value)
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 1000


def test_a_name_that_leads_through_a_linked_folder_is_refused(tmp_path: Path) -> None:
    outside(tmp_path)
    (folder(tmp_path) / "part").symlink_to(tmp_path)
    with pytest.raises(InputError, match="is a link that leads out of its folder"):
        inside(tmp_path / "model", "part/secret")


def test_a_link_inside_the_folder_is_refused_only_where_links_are(tmp_path: Path) -> None:
    model = folder(tmp_path)
    (model / "a").write_text("a")
    (model / "b").symlink_to("a")
    assert inside(model, "b") == model / "b"
    with pytest.raises(InputError, match="is a link"):
        inside(model, "b", links=False)


def test_a_name_outside_is_reported_and_never_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret, model = outside(tmp_path), folder(tmp_path)
    (model / "link").symlink_to(secret)
    (model / "part").symlink_to(tmp_path)
    monkeypatch.setattr(foreign, "sha256", lambda path: pytest.fail(f"{path} was read"))
    names = ["../secret", str(secret), "link", "part/secret", "a\nb", "missing"]
    found = differing_files(model, dict.fromkeys(names, "0" * 64))
    assert list(found) == names
    assert found["missing"] == "is missing"
    assert "link" in found["link"] and "link" in found["part/secret"]


# Which files may be read.


def fifo(path: Path, _: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path, _: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))


REFUSED: dict[str, tuple[Make, str]] = {
    "a link to a file outside": (Path.symlink_to, "is a link that leads out of its folder"),
    "a link to /etc/passwd": (
        lambda path, _: path.symlink_to("/etc/passwd"),
        "is a link that leads out of its folder, to /etc/passwd",
    ),
    "a link to a device": (lambda path, _: path.symlink_to("/dev/zero"), "is a link that leads"),
    "a link to nothing": (lambda path, _: path.symlink_to("gone"), "is a link to a file that is"),
    "a link to itself": (lambda path, _: path.symlink_to(path.name), "is a link to a file that is"),
    "a link to its folder": (lambda path, _: path.symlink_to("."), "is a folder, not a regular"),
    "a folder": (lambda path, _: path.mkdir(), "is a folder, not a regular file"),
    "a pipe": (fifo, "is a device, a pipe or a socket, not a regular file"),
    "a socket": (a_socket, "is a device, a pipe or a socket, not a regular file"),
}


@pytest.mark.parametrize(("make", "problem"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_a_regular_file_of_the_folder_is_refused(
    make: Make, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = folder(tmp_path) / "config.json"
    make(path, outside(tmp_path))
    with pytest.raises(InputError) as raised:
        read_json(path)
    assert str(raised.value).startswith(f"{path}: {problem}")


def test_a_hub_cache_has_links_to_its_own_blobs_and_to_no_others(tmp_path: Path) -> None:
    for model in ("models--a--b", "models--c--d"):
        (tmp_path / model / "blobs").mkdir(parents=True)
        (tmp_path / model / "blobs" / "0").write_text("{}")
    snapshot = tmp_path / "models--a--b" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").symlink_to("../../blobs/0")
    (snapshot / "tokenizer.json").symlink_to("../../../models--c--d/blobs/0")
    (tmp_path / "latest").symlink_to(snapshot)
    assert read_json(snapshot / "config.json") == {}
    assert read_json(tmp_path / "latest" / "config.json") == {}
    with pytest.raises(InputError, match="is a link that leads out of its folder"):
        present(snapshot / "tokenizer.json")


def test_blobs_that_are_a_link_are_no_part_of_a_hub_cache(tmp_path: Path) -> None:
    outside(tmp_path)
    snapshot = tmp_path / "models--a--b" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").symlink_to(tmp_path)
    (snapshot / "config.json").symlink_to("../../blobs/secret")
    with pytest.raises(InputError, match="is a link that leads out of its folder"):
        read_json(snapshot / "config.json")


def test_a_folder_given_as_a_link_is_read(tmp_path: Path) -> None:
    (folder(tmp_path) / "a.json").write_text("{}")
    (tmp_path / "link").symlink_to("model")
    assert read_json(tmp_path / "link" / "a.json") == {}


def test_a_missing_file_is_missing_and_no_error(tmp_path: Path) -> None:
    assert not present(tmp_path / "a")
    (tmp_path / "a").write_text("")
    assert present(tmp_path / "a")


def test_a_file_over_its_limit_is_refused_with_the_limit(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert present(tmp_path / "a", 5)
    assert read_bytes(tmp_path / "a", 5) == b"12345"
    for read in (present, read_bytes):
        with pytest.raises(InputError, match="is larger than the limit of 4 bytes"):
            read(tmp_path / "a", 4)
    with pytest.raises(InputError, match="is larger than the limit of 10 bytes"):
        read_bytes(Path("/proc/self/status"), 10)  # its size is 0


# JSON.

NOT_READ: dict[str, tuple[bytes, str]] = {
    "deep lists": (b"[" * 100_000 + b"]" * 100_000, f"the limit of {DEPTH} levels"),
    "deep lists that do not end": (b"[" * 100_000, f"the limit of {DEPTH} levels"),
    "deep objects": (b'{"a":' * 5_000 + b"1" + b"}" * 5_000, f"the limit of {DEPTH} levels"),
    "a level too deep": (b"[" * (DEPTH + 1) + b"]" * (DEPTH + 1), f"limit of {DEPTH} levels"),
    "an integer of 5,001 digits": (b"1" * 5001, "has a number of 5,001 digits; the limit is 300"),
    "a negative one": (b"-" + b"1" * 5001, "has a number of 5,002 digits"),
    "a fraction of 5,001 digits": (b"0." + b"1" * 5001, "has a number of 5,003 digits"),
    "10**400": (b"1" + b"0" * 400, "has a number of 401 digits"),
    "a key twice": (b'{"a": 1, "b": 2, "a": 1}', "has the key 'a' twice"),
    "a key twice, inside": (
        b'[{"x": {"a\\u001b": 1, "a\\u001b": 2}}]',
        "has the key 'a\\x1b' twice",
    ),
    "a byte order mark": (b"\xef\xbb\xbf{}", "is not valid JSON"),
    "UTF-16": ("{}".encode("utf-16"), "is not valid JSON"),
    "Latin-1": (b'{"a": "\xfc"}', "is not valid JSON in UTF-8 ('utf-8' codec can't decode"),
    "half of a surrogate pair": (
        b'{"a": "\\ud800"}',
        "is not valid JSON in UTF-8 ('utf-8' codec can't",
    ),
    "half of one as a key": (
        b'{"\\ud800": 1}',
        "is not valid JSON in UTF-8 ('utf-8' codec can't encode",
    ),
    "two values": (b"{} {}", "is not valid JSON (Extra data"),
    "nothing": (b"", "is not valid JSON"),
}


@pytest.mark.parametrize(("content", "problem"), NOT_READ.values(), ids=NOT_READ)
def test_json_over_a_limit_is_refused_with_the_limit(
    content: bytes, problem: str, tmp_path: Path
) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError) as raised:
        read_json(tmp_path / "a.json")
    assert problem in str(raised.value)
    assert str(raised.value).isprintable()


def test_json_at_its_limits_is_read() -> None:
    deep = b"[" * DEPTH + b"]" * DEPTH
    digits = b"9" * DIGITS
    assert parse_json(deep, "a") == json.loads(deep)
    assert parse_json(digits, "a") == int(digits)
    assert float(parse_json(digits, "a")) > 1e299


# What an error shows.


def test_a_value_in_an_error_is_short_however_long_it_is() -> None:
    wide: list[object] = ["x" * 10**6] * 10**5
    for _ in range(5):
        wide = [wide] * 1000
    assert len(short(wide)) <= 200
    assert short([1, "a", None]) == "[1, 'a', None]"


def test_the_message_of_an_error_is_bounded_and_printable() -> None:
    error = InputError("\x1b[31m" + "s" * 10**6, "p\n" * 10**6, "r\u202e" * 10**6)
    assert len(str(error)) < 10_000
    assert str(error).isprintable()
    assert str(error).startswith("\\x1b[31msss")


def test_what_a_terminal_prints_is_left_as_it_is() -> None:
    assert printable("größer 🙂 x") == "größer 🙂 x"
    assert printable("\x1b]0;title\x07\udcff") == "\\x1b]0;title\\x07\\udcff"
