"""Files that appear whole or not at all, folders held by one run, hashes and safetensors."""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from exporter import files
from exporter.errors import InputError
from exporter.files import (
    Output,
    claim_folder,
    copy_file,
    differing_files,
    made_from,
    package_versions,
    read_json,
    replacing,
    sha256,
    write_json,
)
from exporter.tensors import write_safetensors

OUTPUT = Output("first.bin", "last.json", ("other.txt", "part"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# One file.


def test_a_replaced_file_has_the_new_content_and_nothing_else_is_left(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old and longer")
    with replacing(tmp_path / "a") as file:
        file.write(b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert names(tmp_path) == ["a"]


def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with replacing(tmp_path / "a") as file:
        file.write(b"new")
        file.flush()
        assert (tmp_path / "a").read_bytes() == b"old"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_the_old_file_and_nothing_else(
    error: type[BaseException], tmp_path: Path
) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(error), replacing(tmp_path / "a") as file:
        file.write(b"new")
        raise error
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_an_exception_leaves_no_file_where_there_was_none(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), replacing(tmp_path / "a") as file:
        file.write(b"new")
        raise RuntimeError
    assert names(tmp_path) == []


def test_what_a_killed_run_left_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / ".a.tmp").write_bytes(b"half of something much longer")
    with replacing(tmp_path / "a") as file:
        file.write(b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert names(tmp_path) == ["a"]


def test_the_folder_of_a_file_is_made(tmp_path: Path) -> None:
    with replacing(tmp_path / "b" / "c" / "a") as file:
        file.write(b"new")
    assert (tmp_path / "b" / "c" / "a").read_bytes() == b"new"


def test_a_copy_has_every_byte(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000
    (tmp_path / "a").write_bytes(data)
    copy_file(tmp_path / "a", tmp_path / "b" / "c")
    assert (tmp_path / "b" / "c").read_bytes() == data


def test_json_comes_back_as_it_was_written(tmp_path: Path) -> None:
    content = {"b": [1, 2.5, None, True], "a": {"ü": "🙂"}}
    write_json(tmp_path / "a.json", content)
    assert read_json(tmp_path / "a.json") == content
    assert list(read_json(tmp_path / "a.json")) == ["b", "a"]
    assert "🙂" in (tmp_path / "a.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "no such file"),
        (b"", "is not valid JSON"),
        (b"{", "is not valid JSON"),
        (b'{"a": "\xff"}', "is not valid JSON"),
        (b"[1]", "holds a list, not an object"),
        (b"7", "holds a int, not an object"),
        (b"null", "holds a NoneType, not an object"),
    ],
    ids=str,
)
def test_what_is_no_json_object_is_refused(
    content: bytes | None, problem: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as raised:
        read_json(path)
    assert str(raised.value).startswith(f"{path}: {problem}")


# Hashes.


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1, 3_000_000])
def test_sha256_is_that_of_the_whole_file(size: int, tmp_path: Path) -> None:
    data = (b"0123456789abcdef" * (size // 16 + 1))[:size]
    (tmp_path / "a").write_bytes(data)
    assert sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_sha256_of_three_letters_is_the_published_one(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256(tmp_path / "a") == expected


def test_files_that_differ_are_named_with_what_is_wrong(tmp_path: Path) -> None:
    for name in ("same", "changed", "link", "folder", "missing"):
        (tmp_path / name).write_bytes(b"content")
    hashes = {name: sha256(tmp_path / name) for name in names(tmp_path)}
    (tmp_path / "changed").write_bytes(b"Content")
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to(tmp_path / "same")
    (tmp_path / "missing").unlink()
    (tmp_path / "folder").unlink()
    (tmp_path / "folder").mkdir()
    found = differing_files(tmp_path, hashes)
    changed = found.pop("changed")
    assert changed == f"has sha256 {sha256(tmp_path / 'changed')[:12]}…, not {hashes['same'][:12]}…"
    assert found.pop("link") == "is a link, or lies below one"
    assert found == {"folder": "is a folder, not a regular file", "missing": "is missing"}


@pytest.mark.parametrize(
    ("manifest", "same"),
    [
        ({"a": 1, "b": [2], "files": {}}, True),
        ({"b": [2], "files": {"x": "y"}, "a": 1}, True),
        ({"a": 1, "b": [2]}, False),
        ({"a": 1, "b": [2], "files": []}, False),
        ({"a": 2, "b": [2], "files": {}}, False),
        ({"a": 1, "files": {}}, False),
        ({"a": 1, "b": [2], "c": 3, "files": {}}, False),
        (None, False),
    ],
    ids=str,
)
def test_a_manifest_is_of_an_identity_when_all_but_its_files_are_equal(
    manifest: dict[str, Any] | None, same: bool, tmp_path: Path
) -> None:
    if manifest is not None:
        write_json(tmp_path / "m.json", manifest)
    assert made_from(tmp_path / "m.json", {"a": 1, "b": [2]}) is same


def test_versions_are_given_for_what_is_installed_only() -> None:
    assert package_versions("torch", "no-such-package-here") == {"torch": torch.__version__}


# Folders.


def fill(folder: Path, *made: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in made:
        (folder / name).write_text(f"old {name}")
    return folder


def claim_refused(out: Path, same: bool = False, overwrite: bool = False) -> str:
    """The message of a refusal; what was in the folder must still be there, unchanged."""
    before = {p.name: p.read_bytes() for p in out.iterdir()} if out.is_dir() else None
    with pytest.raises(InputError) as raised, claim_folder(out, OUTPUT, same, overwrite):
        pytest.fail("the folder was given")
    assert before == ({p.name: p.read_bytes() for p in out.iterdir()} if out.is_dir() else None)
    assert str(out) in str(raised.value)
    assert raised.value.remedy
    return str(raised.value)


FOREIGN: dict[str, list[str]] = {
    "a foreign file": ["thesis.tex"],
    "a foreign file in a finished result": ["first.bin", "last.json", "thesis.tex"],
    "a foreign file in an unfinished one": ["first.bin", "thesis.tex"],
    "a hidden file": [".git"],
    "another's temporary file": [".thesis.tex.tmp"],
    "a name of ours without the first": ["other.txt"],
    "only the seal": ["last.json"],
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("held", FOREIGN.values(), ids=FOREIGN)
def test_a_folder_of_something_else_is_refused_and_left_alone(
    held: list[str], overwrite: bool, tmp_path: Path
) -> None:
    message = claim_refused(fill(tmp_path / "out", *held), overwrite=overwrite)
    foreign = next((name for name in held if "thesis" in name or name == ".git"), held[0])
    assert f"holds other files ({foreign})" in message
    assert "nothing in this one was changed" in message


UNFINISHED: dict[str, list[str]] = {
    "empty": [],
    "only begun": [".first.bin.tmp"],
    "the first file": ["first.bin"],
    "all but the seal": ["first.bin", "other.txt", "part"],
    "the seal half written": ["first.bin", "other.txt", ".last.json.tmp"],
}


@pytest.mark.parametrize("held", UNFINISHED.values(), ids=UNFINISHED)
def test_what_a_killed_run_left_is_continued_with_its_files(
    held: list[str], tmp_path: Path
) -> None:
    out = fill(tmp_path / "out", *held)
    with claim_folder(out, OUTPUT, same_inputs=False, overwrite=False):
        assert names(out) == sorted(held)


def test_a_new_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    with claim_folder(tmp_path / "a" / "b", OUTPUT, same_inputs=False, overwrite=False):
        assert (tmp_path / "a" / "b").is_dir()


def test_the_finished_result_of_other_inputs_is_refused(tmp_path: Path) -> None:
    message = claim_refused(fill(tmp_path / "out", "first.bin", "last.json"))
    assert "finished result of other inputs" in message
    assert "--overwrite" in message


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_finished_result_of_the_same_inputs_is_kept(overwrite: bool, tmp_path: Path) -> None:
    out = fill(tmp_path / "out", "first.bin", "last.json")
    with claim_folder(out, OUTPUT, same_inputs=True, overwrite=overwrite):
        assert names(out) == ["first.bin", "last.json"]


def test_overwrite_clears_files_and_folders(tmp_path: Path) -> None:
    out = fill(tmp_path / "out", "first.bin", "last.json")
    fill(out / "part", "deep")
    with claim_folder(out, OUTPUT, same_inputs=False, overwrite=True):
        assert names(out) == []


@pytest.mark.parametrize("place", ["file", "file/out", "file/out/below", "dangling"])
def test_what_is_no_folder_is_refused(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError) as raised, claim_folder(tmp_path / place, OUTPUT, False, False):
        pytest.fail("the folder was given")
    assert str(tmp_path / Path(place).parts[0]) in str(raised.value)
    assert raised.value.remedy
    assert (tmp_path / "file").read_text() == "mine"
    assert names(tmp_path) == ["dangling", "file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to a read-only folder")
@pytest.mark.parametrize("place", ["out", "out/below"])
def test_a_folder_that_cannot_be_written_is_refused(place: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o500)
    message = claim_refused(tmp_path / place)
    assert f"{tmp_path / 'out'} is read-only" in message
    assert "Choose another folder" in message


HOLD = """
import sys
from pathlib import Path
from exporter.files import Output, claim_folder
with claim_folder(Path(sys.argv[1]), Output("first.bin", "last.json"), False, False):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_a_folder_held_by_another_process_is_refused_until_it_ends(tmp_path: Path) -> None:
    """Takes as long as another Python needs to import torch."""
    out = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        try:
            assert other.stdout.readline() == b"held\n"
            for overwrite in (False, True):
                message = claim_refused(out, overwrite=overwrite)
                assert "another run is writing this folder" in message
        finally:
            with contextlib.suppress(BrokenPipeError):
                other.stdin.close()
            other.wait(30)
    with claim_folder(out, OUTPUT, same_inputs=False, overwrite=False):
        assert names(out) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_folder_is_free_again_after_an_exception(
    error: type[BaseException], tmp_path: Path
) -> None:
    with pytest.raises(error), claim_folder(tmp_path / "out", OUTPUT, False, False):
        raise error
    with claim_folder(tmp_path / "out", OUTPUT, same_inputs=False, overwrite=False):
        assert names(tmp_path / "out") == []


def test_a_folder_is_held_against_a_second_claim_of_the_same_process(tmp_path: Path) -> None:
    with claim_folder(tmp_path / "out", OUTPUT, same_inputs=False, overwrite=False):
        assert "another run" in claim_refused(tmp_path / "out")


def test_a_refusal_lets_go_of_the_folder(tmp_path: Path) -> None:
    out = fill(tmp_path / "out", "first.bin", "last.json")
    claim_refused(out)
    with claim_folder(out, OUTPUT, same_inputs=True, overwrite=False):
        assert names(out) == ["first.bin", "last.json"]


def test_a_result_that_another_run_finished_in_the_meantime_is_not_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other run ends between our look at the folder and our lock on it."""
    out = fill(tmp_path / "out", "first.bin")
    lock = files._lock

    def finish_then_lock(descriptor: int, folder: Path) -> None:
        fill(out, "last.json")
        lock(descriptor, folder)

    monkeypatch.setattr(files, "_lock", finish_then_lock)
    with (
        pytest.raises(InputError, match="other inputs"),
        claim_folder(out, OUTPUT, same_inputs=False, overwrite=False),
    ):
        pytest.fail("the folder was given")
    assert names(out) == ["first.bin", "last.json"]


# Safetensors.

TENSORS: dict[str, torch.Tensor] = {
    "b": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "a": torch.tensor([[-128, 127, 0]], dtype=torch.int8),
    "codes": torch.arange(256, dtype=torch.uint8).reshape(16, 16),
    "half": torch.tensor([1.5, -2.25, 65504.0], dtype=torch.float16),
    "brain": torch.tensor([1.5, -2.25, 3e38], dtype=torch.bfloat16),
    "transposed": torch.arange(6, dtype=torch.float32).reshape(2, 3).T,
    "ü🙂": torch.ones(1),
}


def write_all(path: Path, tensors: dict[str, torch.Tensor] = TENSORS) -> Path:
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_safetensors(path, layout, tensors.__getitem__, {"format": "pt"})
    return path


def test_the_library_of_safetensors_reads_what_is_written(tmp_path: Path) -> None:
    found = load_file(write_all(tmp_path / "a.safetensors"))
    assert set(found) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def test_the_metadata_is_written(tmp_path: Path) -> None:
    with safe_open(write_all(tmp_path / "a.safetensors"), framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_tensors_lie_in_the_order_of_the_layout_from_a_multiple_of_8(tmp_path: Path) -> None:
    data = write_all(tmp_path / "a.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__")
    assert list(header) == list(TENSORS)
    assert length % 8 == 0
    starts = [entry["data_offsets"][0] for entry in header.values()]
    assert starts == sorted(starts)
    assert len(data) == 8 + length + sum(tensor.nbytes for tensor in TENSORS.values())


def test_one_tensor_is_asked_for_at_a_time_in_the_order_of_the_layout(tmp_path: Path) -> None:
    asked = list[str]()

    def tensor(name: str) -> torch.Tensor:
        asked.append(name)
        return TENSORS[name]

    layout = {name: (value.dtype, tuple(value.shape)) for name, value in TENSORS.items()}
    write_safetensors(tmp_path / "a.safetensors", layout, tensor, {})
    assert asked == list(TENSORS)


def test_a_tensor_that_cannot_be_made_leaves_no_file(tmp_path: Path) -> None:
    def tensor(name: str) -> torch.Tensor:
        if name == "b":
            return torch.ones(2)
        raise InputError(name, "cannot be made")

    layout = {"b": (torch.float32, (2,)), "a": (torch.float32, (2,))}
    with pytest.raises(InputError, match="a: cannot be made"):
        write_safetensors(tmp_path / "a.safetensors", layout, tensor, {})
    assert names(tmp_path) == []


def test_two_files_of_the_same_tensors_are_equal(tmp_path: Path) -> None:
    one, two = (write_all(tmp_path / name) for name in ("a.safetensors", "b.safetensors"))
    assert one.read_bytes() == two.read_bytes()
