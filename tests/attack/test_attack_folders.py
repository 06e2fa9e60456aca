"""Folders that are not ours: links, special files, names that lead out, and files over a limit.

Every row of a table is one attack on a command. It must end with exit code 2, say which file and
why, and leave the file of somebody else unread and unchanged.
"""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from commands import Outcome, contents, run
from tiny import TARGET, write_sharded, write_tiny_bundle, write_tiny_checkpoint

from devices.files import replacing
from exporter.cli import COMMANDS, main
from exporter.evaluation.tasks import find_answer
from exporter.files import replacing_folder
from exporter.model.checkpoint import COMPANION_FILES

SECRET = "the secret of somebody else"
RECIPE = f"model: tiny\ntargets: [{{target: {TARGET}, max_context: 64}}]\n"
#: No attack may need longer, in seconds.
SECONDS = 20

Capture = pytest.CaptureFixture[str]
Make = Callable[[Path, Path], object]


@dataclass(frozen=True)
class World:
    """Copies of a checkpoint and a bundle in `root`, and a file of somebody else outside of it."""

    root: Path
    secret: Path

    @property
    def checkpoint(self) -> Path:
        return self.root / "checkpoint"

    @property
    def bundle(self) -> Path:
        return self.root / "bundle"

    def quantize(self, *overrides: str, out: object = "out") -> list[object]:
        return ["quantize", "tiny.yaml", *overrides, "--checkpoint", self.checkpoint, "-o", out]

    def export(self, out: object = "out") -> list[object]:
        return ["export", "tiny.yaml", "--checkpoint", self.checkpoint, "-o", out]

    def lower(self, out: object = "out") -> list[object]:
        quantized = self.bundle / "quantized"
        return ["lower", quantized, "--target", TARGET, "-o", out, "max_context=64"]

    def generate(self, path: Path) -> list[object]:
        return ["generate", path, "--prompt", "ab", "--max-new-tokens", "2"]

    def refused(self, capsys: Capture, *arguments: object) -> str:
        """The message of a command that must be refused; nothing may change or be read."""
        before = contents(self.secret.parent)
        started = time.monotonic()
        outcome: Outcome = run(capsys, *arguments, "--json")
        assert time.monotonic() - started < SECONDS
        said = outcome.out + outcome.err
        assert outcome.code == 2, said
        assert list(outcome.json) == ["error"]
        assert SECRET not in said
        assert hashlib.sha256(self.secret.read_bytes()).hexdigest()[:12] not in said
        assert contents(self.secret.parent) == before
        for folder, _, names in os.walk(self.root / "out"):
            regular = [path for name in names if (path := Path(folder, name)).is_file()]
            for path in regular:
                assert path.is_symlink() or SECRET not in path.read_text("latin-1")
        return str(outcome.json["error"])


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("seeds")
    (root / "tiny.yaml").write_text(RECIPE)
    write_tiny_checkpoint(root / "checkpoint")
    write_tiny_bundle(root / "checkpoint", root / "tiny.yaml", root / "bundle")
    return root


@pytest.fixture
def world(seeds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    root = Path(shutil.copytree(seeds, tmp_path / "root"))
    (tmp_path / "home").mkdir()
    secret = tmp_path / "home" / ".bashrc"
    secret.write_text(SECRET)
    monkeypatch.chdir(root)
    return World(root, secret)


def link(path: Path, secret: Path) -> None:
    path.symlink_to(secret)


def link_to_folder(path: Path, secret: Path) -> None:
    path.symlink_to(secret.parent)


def dangling(path: Path, secret: Path) -> None:
    path.symlink_to(secret.parent / "new")


def fifo(path: Path, _: Path) -> None:
    os.mkfifo(path)


def device(path: Path, _: Path) -> None:
    path.symlink_to("/dev/zero")


def huge(path: Path, _: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


# Writing.

WRITTEN: dict[str, tuple[str, str, Make]] = {
    f"{command} {place}: {make.__name__}": (command, place, make)
    for command, places in {
        "quantize": (
            ".quantized.safetensors.tmp", "quantized.safetensors", ".quantization.json.tmp",
            "quantization.json", "config.json", ".tokenizer.json.tmp", "calibration",
        ),
        "lower": (f"model.{TARGET}", f".model.{TARGET}.tmp", "artifact.json", "tokenizer.json"),
        "export": (
            TARGET, "quantized", "SHA256SUMS", ".SHA256SUMS.tmp", "manifest.json",
            f"{TARGET}/onnx/model_q4.onnx", f"{TARGET}/.artifact.json.tmp",
            "quantized/.quantized.safetensors.tmp", "quantized/calibration",
        ),
    }.items()
    for number, place in enumerate(places)
    for make in ((link, link_to_folder, dangling, fifo) if not number else (link,))
}  # fmt: skip


@pytest.mark.parametrize(("command", "place", "make"), WRITTEN.values(), ids=WRITTEN)
def test_a_link_or_a_pipe_in_an_output_folder_is_refused_by_its_name(
    command: str, place: str, make: Make, world: World, capsys: Capture
) -> None:
    path = world.root / "out" / place
    path.parent.mkdir(parents=True)
    begun = {
        "quantize": "quantized.safetensors",
        "lower": ".artifact.json.tmp",
        "export": "quantized",
    }
    first = world.root / "out" / begun[command]
    if first not in (path, *path.parents):  # the folder of a run that was killed
        first.mkdir() if command == "export" else first.touch()
    make(path, world.secret)
    arguments = {"quantize": world.quantize, "lower": world.lower, "export": world.export}
    message = world.refused(capsys, *arguments[command]())
    assert place in message
    assert path.is_symlink() or path.is_fifo()


OUTPUTS: dict[str, tuple[Callable[[World], object], str]] = {
    "/": (lambda w: "/", "holds the model that is read"),
    "the working directory": (lambda w: ".", "holds"),
    "the checkpoint": (lambda w: w.checkpoint, "holds the model that is read"),
    "the checkpoint by a link": (
        lambda w: ((w.root / "link").symlink_to(w.checkpoint), w.root / "link")[1],
        "holds the model that is read",
    ),
    "the folder of the checkpoint": (lambda w: w.root, "holds the model that is read"),
    "a device": (lambda w: "/dev/null", "is a file"),
    "below a device": (lambda w: "/dev/null/out", "lies below /dev/null, which is a file"),
    "a pipe": (lambda w: (os.mkfifo("pipe"), "pipe")[1], "is a file"),
    "a name that is too long": (lambda w: "x" * 300, "File name too long"),
    "escape sequences": (
        lambda w: ((w.root / "\x1b[2J").mkdir(), (w.root / "\x1b[2J" / "a").touch(), "\x1b[2J")[2],
        "\\x1b[2J: holds other files",
    ),
}


@pytest.mark.parametrize(("out", "said"), OUTPUTS.values(), ids=OUTPUTS)
@pytest.mark.parametrize("command", ["quantize", "export"])
def test_an_output_that_is_no_folder_for_it_is_refused(
    command: str, out: Callable[[World], object], said: str, world: World, capsys: Capture
) -> None:
    arguments = {"quantize": world.quantize, "export": world.export}
    assert said in world.refused(capsys, *arguments[command](out=out(world)))


def test_an_output_folder_given_as_a_link_is_written(world: World, capsys: Capture) -> None:
    (world.root / "real").mkdir()
    (world.root / "out").symlink_to("real")
    outcome = run(capsys, *world.quantize())
    assert outcome.code == 0, outcome.err
    assert (world.root / "real" / "quantization.json").is_file()


@pytest.mark.parametrize("make", [link, dangling, device])
def test_what_lies_at_the_temporary_name_is_never_written_through(
    make: Make, tmp_path: Path, world: World
) -> None:
    """Also where another process puts it there after the folder was checked."""
    make(tmp_path / ".a.tmp", world.secret)
    with replacing(tmp_path / "a") as file:
        file.write(b"new")
    make(tmp_path / ".b.tmp", world.secret)
    with replacing_folder(tmp_path / "b") as folder:
        (folder / "file").write_bytes(b"new")
    link_to_folder(tmp_path / "c", world.secret)
    with replacing_folder(tmp_path / "c") as folder:
        (folder / "file").write_bytes(b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert [(tmp_path / name / "file").read_bytes() for name in "bc"] == [b"new", b"new"]
    assert contents(world.secret.parent) == {".bashrc": hashlib.sha256(SECRET.encode()).hexdigest()}


def test_a_file_is_not_written_to_a_device_or_a_folder(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (Path("/dev/null"), tmp_path / "pipe", Path("/"), Path(), tmp_path):
        with pytest.raises(OSError, match="not a file"), replacing(path):
            pytest.fail("it was opened")
    assert Path("/dev/null").is_char_device()


# Reading.

READ: dict[str, tuple[str, Make]] = {
    f"{name}: {make.__name__}": (name, make)
    for name in (*COMPANION_FILES, "model.safetensors", "model.safetensors.index.json")
    for make in (link, link_to_folder, dangling, fifo, device, huge)
    if make in (link, fifo) or name in ("config.json", "vocab.json")
}


@pytest.mark.parametrize(("name", "make"), READ.values(), ids=READ)
def test_a_file_of_a_checkpoint_that_is_none_of_its_own_is_refused(
    name: str, make: Make, world: World, capsys: Capture
) -> None:
    path = world.checkpoint / name
    path.unlink(missing_ok=True)
    make(path, world.secret)
    for command in (["inspect", world.checkpoint], world.quantize()):
        assert name in world.refused(capsys, *command)


@pytest.mark.parametrize("make", [link, link_to_folder, dangling, fifo, device])
def test_a_shard_that_leads_out_is_refused(make: Make, world: World, capsys: Capture) -> None:
    write_sharded(world.checkpoint)
    (world.checkpoint / "model-1.safetensors").unlink()
    make(world.checkpoint / "model-1.safetensors", world.secret)
    assert "model-1.safetensors" in world.refused(capsys, *world.quantize())


def test_a_snapshot_of_the_hub_cache_is_read_and_stays_in_its_blobs(
    world: World, capsys: Capture
) -> None:
    snapshot = world.root / "models--a--b" / "snapshots" / "1"
    blobs = world.root / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for place, path in enumerate(sorted(world.checkpoint.iterdir())):
        path.rename(blobs / str(place))
        (snapshot / path.name).symlink_to(f"../../blobs/{place}")
    world.checkpoint.rmdir()
    world.checkpoint.symlink_to(snapshot)
    outcome = run(capsys, *world.quantize())
    assert outcome.code == 0, outcome.err
    (snapshot / "vocab.json").symlink_to(world.secret)
    assert "vocab.json" in world.refused(capsys, *world.quantize())


IN_A_BUNDLE: dict[str, tuple[str, Make]] = {
    f"{name}: {make.__name__}": (name, make)
    for name in (
        "quantized/quantization.json", "quantized/quantized.safetensors", "quantized/config.json",
        "quantized/tokenizer.json", f"{TARGET}/artifact.json", f"{TARGET}/onnx/model_q4.onnx",
        f"{TARGET}/tokenizer.json", "manifest.json",
    )
    for make in (link, link_to_folder, dangling, fifo, device, huge)
    if make is link or name == "quantized/quantization.json"
}  # fmt: skip


@pytest.mark.parametrize(("name", "make"), IN_A_BUNDLE.values(), ids=IN_A_BUNDLE)
def test_a_file_of_a_bundle_that_is_none_of_its_own_is_refused(
    name: str, make: Make, world: World, capsys: Capture
) -> None:
    path = world.bundle / name
    path.unlink()
    make(path, world.secret)
    part = world.bundle / Path(name).parts[0]
    for command in (world.generate(world.bundle), world.generate(part)):
        if name == "manifest.json" and command[1] == part:
            continue
        world.refused(capsys, *command)
    if name.startswith("quantized"):
        world.refused(capsys, *world.lower())


NAMES = (
    "../../home/.bashrc", "{secret}", "a/../../../home/.bashrc", "./x", "a//b", "", "/", "..", ".",
    "a\x00b", "a\nb", "\x1b[2J", "x" * 300, "a/" * 2000, "\ud800",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:30])
@pytest.mark.parametrize("manifest", ["quantized/quantization.json", f"{TARGET}/artifact.json"])
def test_a_name_of_a_manifest_that_leads_out_is_refused_and_never_hashed(
    manifest: str, name: str, world: World, capsys: Capture
) -> None:
    path = world.bundle / manifest
    content = json.loads(path.read_text())
    content["files"][name.format(secret=world.secret)] = "0" * 64
    path.write_text(json.dumps(content))
    world.refused(capsys, *world.generate(path.parent))


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:30])
def test_a_shard_of_an_index_that_leads_out_is_refused(
    name: str, world: World, capsys: Capture
) -> None:
    write_sharded(world.checkpoint)
    index = world.checkpoint / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = name.format(secret=world.secret)
    index.write_text(json.dumps(content))
    world.refused(capsys, *world.quantize())


# Limits.

JSON_FILES = {
    "config.json": "checkpoint", "generation_config.json": "checkpoint",
    "model.safetensors.index.json": "checkpoint", "quantization.json": "bundle/quantized",
    "artifact.json": f"bundle/{TARGET}",
}  # fmt: skip
JSON: dict[str, bytes] = {
    "deep": b"[" * 100_000,
    "deep and closed": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "digits": b'{"a": ' + b"9" * 5001 + b"}",
    "10**400": b'{"num_hidden_layers": 1' + b"0" * 400 + b"}",
    "twice": b'{"a": 1, "a": 2}',
    "Latin-1": b'{"a": "\xe9"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf{}",
    "half of a pair": b'{"a": "\\ud800"}',
    "too large": b'{"a": "' + b" " * (17 << 20) + b'"}',
    "a list": b"[]",
    "a number": b"7",
    "null": b"null",
    "empty": b"",
}


@pytest.mark.parametrize("content", JSON.values(), ids=JSON)
def test_json_over_a_limit_is_refused_with_its_file(
    content: bytes, world: World, capsys: Capture
) -> None:
    for name, place in JSON_FILES.items():
        path = world.root / place / name
        before = path.read_bytes() if path.exists() else None
        path.write_bytes(content)
        assert name in world.refused(capsys, *world.generate(path.parent))
        path.unlink()
        if before is not None:
            path.write_bytes(before)


SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size_mlp", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
    *("rms_norm_eps", "rope_theta"),
)


@pytest.mark.parametrize("key", SIZES)
def test_a_number_of_a_configuration_out_of_range_is_refused_before_a_shape_is_listed(
    key: str, world: World, capsys: Capture
) -> None:
    path = world.checkpoint / "config.json"
    content = json.loads(path.read_text())
    for value in (10**18, 10**290, 1e300, -1, 0, float("inf"), float("nan")):
        path.write_text(json.dumps({**content, key: value}))
        assert key in world.refused(capsys, "inspect", world.checkpoint)


#: 373 bytes that stand for 10^9 texts.
LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
YAML: dict[str, tuple[bytes, str]] = {
    "aliases that grow": (LAUGHS.encode(), "aliases are not supported"),
    "an alias of itself": (b"a: &a [*a]\n", "aliases are not supported"),
    "deep lists": (b"a: " + b"[" * 50_000, "nested deeper than the limit of 64 levels"),
    "deep mappings": (b"a: " + b"{a: " * 5_000, "nested deeper than the limit of 64 levels"),
    "deep blocks": (
        b"".join(b" " * n + b"a:\n" for n in range(400)),
        "nested deeper than the limit of 64 levels",
    ),
    "digits": (b"a: " + b"9" * 5001, "has a number of 5,001 digits"),
    "hexadecimal digits": (b"a: 0x" + b"f" * 50_000, "has a number of 50,002 digits"),
    "more than 64 bits": (b"a: 9223372036854775808\n", "more than 64 bits"),
    "a key twice": (b"name: a\nname: b\n", "the key 'name' is there twice"),
    "a key twice, inside": (
        b"quantization:\n  linear: int4\n  linear: int8\n",
        "line 3",
    ),
    "too long": (b"#" * 100_001, "is larger than the limit of 100,000 bytes"),
    "not UTF-8": (b"name: \xff\n", "is not valid YAML"),
    "an object of Python": (b"a: !!python/object/apply:os.system [ls]\n", "is not valid YAML"),
    "an impossible date": (b"model: 2026-13-45\n", "is not valid YAML"),
}


@pytest.mark.parametrize(("content", "said"), YAML.values(), ids=YAML)
def test_yaml_over_a_limit_is_refused_with_the_limit(
    content: bytes, said: str, world: World, capsys: Capture
) -> None:
    (world.root / "tiny.yaml").write_bytes(content)
    message = world.refused(capsys, *world.quantize())
    assert said in message
    assert "tiny.yaml" in message
    assert len(message) < 3000


OVERRIDES: dict[str, str] = {
    "aliases": "model=[&a x, *a]",
    "deep": "model=" + "[" * 50_000,
    "digits": "max_context=" + "9" * 5001,
    "more than 64 bits": "targets.0.max_context=" + "9" * 100,
    "a key twice": "quantization={linear: int4, linear: int8}",
    "a deep key": "a." * 50_000 + "a=1",
    "an index of 5,001 digits": "targets." + "9" * 5001 + "=1",
    "not UTF-8": "model=\udcff",
    "escape sequences": "model\x1b[2J=1",
}


@pytest.mark.parametrize("override", OVERRIDES.values(), ids=OVERRIDES)
def test_an_override_over_a_limit_is_refused(override: str, world: World, capsys: Capture) -> None:
    assert len(world.refused(capsys, *world.quantize(override))) < 3000


ROWS: dict[str, bytes] = {
    "deep": b'{"text": ' + b"[" * 100_000,
    "digits": b'{"text": "a", "n": ' + b"9" * 5001 + b"}",
    "twice": b'{"text": "a", "text": "b"}',
    "Latin-1": b'{"text": "\xe9"}',
    "half of a pair": b'{"text": "\\ud800"}',
    "a long line": b'{"text": "' + b"a" * (17 << 20) + b'"}',
    "wide": b'{"text": ' + b"[" + b"[]," * 100_000 + b"[]]}",
    "not an object": b"[1]",
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_a_row_over_a_limit_is_refused_with_its_line(
    row: bytes, world: World, capsys: Capture
) -> None:
    (world.root / "data.jsonl").write_bytes(b'{"text": "fine", "messages": []}\n' + row)
    message = world.refused(capsys, "evaluate", world.checkpoint, "--data", "data.jsonl")
    assert "data.jsonl: line 2" in message
    assert len(message) < 3000


@pytest.mark.parametrize("option", ["--data", "--task"])
def test_a_pipe_as_a_data_file_is_refused(option: str, world: World, capsys: Capture) -> None:
    os.mkfifo("data.jsonl")
    message = world.refused(capsys, "evaluate", world.checkpoint, option, "data.jsonl")
    assert "is a device, a pipe or a socket" in message


def test_nested_answers_are_searched_in_linear_time() -> None:
    started = time.monotonic()
    for text in ("\\boxed{" * 50_000, "\\boxed{" * 50_000 + "}" * 25_000, "\\boxed{####" * 50_000):
        find_answer(text)
    assert find_answer("\\boxed{" * 50_000 + "7" + "}" * 50_000) == "7"
    assert time.monotonic() - started < 2


# What reaches the terminal.


def test_names_with_escape_sequences_and_of_other_encodings_are_shown_escaped(
    world: World, capsys: Capture
) -> None:
    for name in ("\x1b]0;title\x07", "\u202egpj", "a\nerror: b", os.fsdecode(b"\xff\xfe")):
        path = world.root / name
        shutil.copytree(world.checkpoint, path)
        for options in ([], ["--json"]):
            outcome = run(capsys, "inspect", path, *options)
            # The library of safetensors opens paths in UTF-8 only.
            assert outcome.code == (2 if "\udcff" in name else 0), outcome.err
            said = (outcome.out + outcome.err).replace("\n", "")
            assert said.isprintable()
        (path / "config.json").unlink()
        outcome = run(capsys, "inspect", path)
        assert outcome.code == 2
        assert outcome.err.removesuffix("\n").isprintable()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("options", [[], ["--json"]], ids=["text", "json"])
def test_streams_of_any_encoding_take_every_name(
    encoding: str, options: list[str], world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shutil.copytree(world.checkpoint, world.root / "é ✓ \x1b[2J")
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding, "strict") for _ in range(2))
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", err)
    for command in (["inspect", path], ["inspect", path / os.fsdecode(b"\xff")]):
        with pytest.raises(SystemExit) as ended:
            main([*map(str, command), *options])
        assert ended.value.code == (0 if command[1] == path else 2)
    out.flush()
    if options:
        for line in out.buffer.getvalue().decode(encoding).splitlines():
            assert json.loads(line)


@pytest.mark.parametrize(
    ("prompt", "given"),
    [("-", b"Ada \xff"), (os.fsdecode(b"Ada \xff"), b""), ("-", b"a" * ((1 << 24) + 1))],
    ids=["standard input", "argument", "too long"],
)
def test_a_prompt_that_cannot_be_read_is_refused(prompt: str, given: bytes, world: World) -> None:
    """In a process of its own, since it reads standard input. Takes as long as loading torch."""
    command = [sys.executable, "-m", "exporter", "generate", world.checkpoint, "--prompt", prompt]
    ended = subprocess.run(command, input=given, capture_output=True, check=False, env=os.environ)
    assert ended.returncode == 2, ended.stderr
    assert b"Traceback" not in ended.stderr
    assert b"prompt" in ended.stderr


@pytest.mark.parametrize("error", [MemoryError, RecursionError])
def test_an_input_that_exhausts_the_memory_or_the_stack_ends_with_2(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def exhaust(_: object) -> int:
        raise error

    monkeypatch.setitem(COMMANDS, "recipes", exhaust)
    outcome = run(capsys, "recipes")
    assert outcome.code == 2
    assert "this input: needs" in outcome.err
    with pytest.raises(ZeroDivisionError):  # a bug stays visible
        monkeypatch.setitem(COMMANDS, "recipes", lambda _: 1 // 0)
        run(capsys, "recipes")
