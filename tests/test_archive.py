"""Archives of bundles: the same bytes from the same files, in bounded memory, for every tool."""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import zstandard
from commands import contents

from exporter.bundle.archive import FORMATS, is_archive, opened, pack
from exporter.errors import InputError

FILES = {
    "README.md": b"# A bundle\n",
    "coreml/model.mlpackage/Data/com.apple.CoreML/weights/weight.bin": bytes(range(256)) * 400,
    "empty": b"",
    "one block": b"x" * 512,
    f"long/{'n' * 120}/{'m' * 200}": b"PAX needs a second header for this name",
    "ünïcode/模型.bin": b"so does this",
    "onnx/model.onnx.data": os.urandom(3_000_000),
    "z": b"last",
}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "folder", FILES)


@pytest.fixture(params=FORMATS)
def archive(request: pytest.FixtureRequest, folder: Path, tmp_path: Path) -> Path:
    out = tmp_path / f"nano{request.param}"
    pack(folder, out, FILES)
    return out


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder for temporary files, in which nothing may be left."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    yield tmp_path / "temporary"
    assert list((tmp_path / "temporary").iterdir()) == []


def test_an_archive_is_opened_to_the_files_that_were_packed(archive: Path, folder: Path) -> None:
    with opened(archive) as found:
        assert contents(found) == contents(folder)
        assert found.name == "nano"


@pytest.mark.parametrize("name", [".zip", "..zip", "...zip"])
def test_an_archive_may_be_named_by_dots_alone(name: str, folder: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / name, FILES)
    with opened(tmp_path / name) as found:
        assert contents(found) == contents(folder)
        assert found.name == "bundle"


def test_a_folder_is_opened_as_it_is(folder: Path, tmp_path: Path) -> None:
    with opened(folder) as found:
        assert found == folder
    named = shutil.copytree(folder, tmp_path / "folder.zip")
    with opened(named) as found:
        assert found == named
    assert not is_archive(named)


def test_the_unpacked_files_are_for_this_user_alone_and_removed_at_the_end(
    archive: Path, temporary: Path
) -> None:
    with opened(archive) as found:
        (private,) = temporary.iterdir()
        assert private.stat().st_mode & 0o777 == 0o700
        assert found.is_relative_to(private)
    assert not private.exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_the_unpacked_files_are_removed_after_an_error(
    error: type[BaseException], archive: Path
) -> None:
    with pytest.raises(error), opened(archive) as found:
        assert found.is_dir()
        raise error


def test_the_unpacked_files_are_removed_when_unpacking_is_interrupted(archive: Path) -> None:
    def interrupt(done: int, total: int, note: str) -> None:
        if note == "onnx/model.onnx.data":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), opened(archive, interrupt):
        pass


def test_ctrl_c_in_a_command_leaves_no_file(archive: Path, temporary: Path) -> None:
    program = (
        "import os, signal, sys, tempfile; from pathlib import Path\n"
        "from exporter.bundle.archive import opened\n"
        "tempfile.tempdir = sys.argv[2]\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job may ignore it
        "with opened(Path(sys.argv[1])) as found:\n"
        "    assert found.is_dir(); os.kill(os.getpid(), signal.SIGINT); signal.pause()"
    )
    command = [sys.executable, "-c", program, str(archive), str(temporary)]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "KeyboardInterrupt" in outcome.stderr


def test_an_error_of_what_is_done_with_an_archive_names_the_archive(archive: Path) -> None:
    with pytest.raises(InputError) as raised, opened(archive) as found:
        raise InputError(found / "z", f"differs from {found / 'empty'}", "Look at it")
    assert str(raised.value) == f"{archive}/z: differs from {archive}/empty. Look at it."


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_same_files_give_the_same_bytes_anywhere_and_any_day(
    suffix: str, folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "another folder" / "other"
    for name in reversed(FILES):
        path = other / name
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.write_bytes(FILES[name])
        path.chmod(0o755)
        os.utime(path, (0, 2_000_000_000))
        if os.geteuid() == 0:
            os.chown(path, 1234, 4321)
    pack(folder, tmp_path / f"one{suffix}", sorted(FILES))
    umask = os.umask(0o077)
    try:
        pack(other, tmp_path / f"two{suffix}", sorted(FILES, reverse=True))
    finally:
        os.umask(umask)
    one, two = (tmp_path / f"{name}{suffix}" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("suffix", FORMATS)
def test_an_archive_does_not_depend_on_the_environment(suffix: str, tmp_path: Path) -> None:
    write(tmp_path / "folder", FILES)
    program = (
        "import sys; from pathlib import Path; from exporter.bundle.archive import pack\n"
        "pack(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])"
    )
    found = set[bytes]()
    settings = ({"TZ": "Asia/Tokyo", "LC_ALL": "C", "PYTHONHASHSEED": "1"}, {"LC_ALL": "C.UTF-8"})
    for number, environment in enumerate(settings):
        out = tmp_path / f"{number}{suffix}"
        command = [sys.executable, "-X", "utf8", "-c", program, tmp_path / "folder", out, *FILES]
        subprocess.run(command, check=True, env={**os.environ, **environment})
        found.add(out.read_bytes())
    assert len(found) == 1


def test_a_tar_is_what_tarfile_writes(folder: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / "a.tar.zst", FILES)
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name in sorted(FILES):
            info = tarfile.TarInfo(name)
            info.size = len(FILES[name])
            with (folder / name).open("rb") as file:
                tar.addfile(info, file)
    packed = (tmp_path / "a.tar.zst").read_bytes()
    assert zstandard.decompress(packed) == (tmp_path / "a.tar").read_bytes()


def test_a_zip_is_what_zipfile_writes(folder: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / "a.zip", FILES)
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        for name in sorted(FILES):
            info = zipfile.ZipInfo(name)
            info.external_attr, info.create_system = 0o100644 << 16, 3
            archive.writestr(info, FILES[name])
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


@pytest.mark.parametrize(
    ("suffix", "command"),
    [
        (".zip", ["unzip", "-q", "ARCHIVE"]),
        (".tar.zst", ["tar", "--use-compress-program=zstd", "-xf", "ARCHIVE"]),
    ],
)
def test_the_tools_of_the_system_unpack_an_archive(
    suffix: str, command: Sequence[str], folder: Path, tmp_path: Path
) -> None:
    for tool in (command[0], "zstd") if suffix == ".tar.zst" else command[:1]:
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed")
    archive = tmp_path / f"a{suffix}"
    pack(folder, archive, FILES)
    (tmp_path / "out").mkdir()
    typed = [str(archive) if word == "ARCHIVE" else word for word in command]
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    subprocess.run(typed, cwd=tmp_path / "out", check=True, env=environment)
    assert contents(tmp_path / "out") == contents(folder)


# Memory and large files. A process that packs or opens a file of holes, and prints its peak memory.

PROGRAM = """
import resource, sys
from pathlib import Path
from exporter.bundle.archive import opened, pack
folder, archive = Path(sys.argv[1]), Path(sys.argv[2])
if not archive.exists():
    pack(folder, archive, ["holes"])
else:
    with opened(archive) as found:
        assert (found / "holes").stat().st_size == (folder / "holes").stat().st_size
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_memory(folder: Path, archive: Path) -> int:
    """The peak memory of packing, or of opening if the archive exists, in bytes."""
    command = [sys.executable, "-c", PROGRAM, str(folder), str(archive)]
    outcome = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(outcome.stdout) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit")
@pytest.mark.parametrize("suffix", FORMATS)
def test_memory_does_not_grow_with_the_bundle(suffix: str, tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    for folder, size in ((small, 1 << 20), (large, 300_000_000)):
        folder.mkdir()
        (folder / "holes").touch()
        os.truncate(folder / "holes", size)
    for _ in ("pack", "open"):
        least, most = (peak_memory(f, tmp_path / f"{f.name}{suffix}") for f in (small, large))
        assert most < least + 60_000_000


def test_nothing_is_left_when_packing_fails(folder: Path, tmp_path: Path) -> None:
    for suffix in FORMATS:
        out = tmp_path / f"a{suffix}"
        out.write_bytes(b"the archive of before")

        def stop(done: int, total: int, note: str) -> None:
            if note == "onnx/model.onnx.data":
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            pack(folder, out, FILES, stop)
        assert out.read_bytes() == b"the archive of before"
        assert list(tmp_path.glob(".*")) == []


def test_progress_ends_with_all_of_it(folder: Path, archive: Path, tmp_path: Path) -> None:
    steps = list[tuple[int, int]]()
    pack(folder, tmp_path / "a.zip", FILES, lambda done, total, _: steps.append((done, total)))
    assert steps[0] == (0, 2)
    assert steps[-1] == (2, 2)
    with opened(archive, lambda done, total, _: steps.append((done, total))):
        assert steps[-1][0] >= 2


# What is not packed.


def link(path: Path) -> None:
    path.symlink_to("z")


def fifo(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(
    ("name", "make", "said"),
    [
        ("link", link, "is a link, or lies below one"),
        ("pipe", fifo, "is a device, a pipe or a socket, not a regular file"),
        ("folder", Path.mkdir, "is a folder, not a regular file"),
        ("missing", lambda path: None, "cannot be opened (No such file or directory)"),
        ("../z", lambda path: path.write_bytes(b""), "is not the plain name of a file"),
        ("a\nb", Path.touch, "is not the plain name of a file"),
        ("README.MD", Path.touch, "is the same as README.MD on some file systems"),
        ("Z/x", lambda path: None, "is the same as Z/ on some file systems"),
        ("empty/x", lambda path: None, "is the same as empty on some file systems"),
        ("/".join("abcdefghijklmnopq"), lambda path: None, "deeper than the limit of 16 folders"),
        ("huge", lambda path: (path.touch(), os.truncate(path, 1 << 40)), "is larger than the"),
    ],
)
def test_what_could_not_be_opened_again_is_not_packed(
    name: str, make: object, said: str, suffix: str, folder: Path, tmp_path: Path
) -> None:
    assert callable(make)
    make(folder / name)
    with pytest.raises(InputError) as raised:
        pack(folder, tmp_path / f"out{suffix}", {**FILES, name: b""})
    assert said in str(raised.value)
    assert not (tmp_path / f"out{suffix}").exists()


def test_a_folder_without_files_and_a_name_that_is_no_archive_are_refused(
    folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="holds no file"):
        pack(folder, tmp_path / "a.zip", [])
    with pytest.raises(InputError, match=r"It ends in \.tar\.zst or \.zip"):
        pack(folder, tmp_path / "a.tgz", FILES)


def test_a_file_that_changes_while_it_is_packed_is_reported(folder: Path, tmp_path: Path) -> None:
    def grow(done: int, total: int, note: str) -> None:
        if note:
            with (folder / note).open("ab") as file:
                file.write(b"more")

    for suffix in FORMATS:
        with pytest.raises(InputError, match="changed while it was packed"):
            pack(folder, tmp_path / f"a{suffix}", ["one block"], grow)
