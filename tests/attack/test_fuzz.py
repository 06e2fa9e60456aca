"""Fuzz every file that the tool reads of a folder that is not ours, through the command line.

A valid file is changed in its structure (a value of another type, a huge number, deep nesting, a
key twice), in its bytes, or in its kind (a link, a pipe, a folder). Whatever the change, a command
ends with exit code 0, 1 or 2 in seconds, prints no control character, and neither reads nor writes
a file outside of its folders. The inputs are the same in every run. ``MOBILELLM_FUZZ=20`` tries 20
times as many and prints how many there were, the slowest one and the memory.
"""

import contextlib
import io
import json
import logging
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import TARGET, write_sharded, write_tiny_bundle, write_tiny_checkpoint

from exporter.cli import main
from exporter.recipe import load_recipe

SCALE = int(os.environ.get("MOBILELLM_FUZZ", "1"))
#: The limits of one input: seconds, and the memory that all inputs may add, in bytes.
SECONDS, MEMORY = 20, 1 << 30
SECRET = "the-secret-of-another-folder"

fuzzed = settings(
    max_examples=25 * SCALE,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


@dataclass
class World:
    """Valid folders to change copies of, and what was measured."""

    root: Path
    tried: int = 0
    codes: dict[int, int] = field(default_factory=dict)
    slowest: tuple[float, str] = (0.0, "")

    @property
    def secret(self) -> Path:
        return self.root / "elsewhere" / "secret.json"

    @property
    def work(self) -> Path:
        """Where the copies are changed and the commands write."""
        return self.root / "work"

    def run(self, what: str, *arguments: object) -> None:
        """Run a command and check that it ended as a command may."""
        outside = snapshot(self.root, besides=self.work)
        out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", newline="") for _ in range(2))
        started = time.monotonic()
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            at_most(SECONDS),
            pytest.raises(SystemExit) as ended,
        ):
            main([str(argument) for argument in arguments])
        seconds = time.monotonic() - started
        logging.getLogger("exporter").handlers.clear()
        code = ended.value.code
        assert code in (0, 1, 2), what
        for stream in (out, err):
            stream.flush()
        said = out.buffer.getvalue().decode() + err.buffer.getvalue().decode()
        assert not [c for c in said if ord(c) < 32 and c not in "\n\t"], what
        assert SECRET not in said, what
        assert snapshot(self.root, besides=self.work) == outside, what
        for path in (self.work / "out").rglob("*"):
            assert not path.is_symlink(), what
            assert not path.is_file() or SECRET.encode() not in path.read_bytes(), what
        self.tried += 1
        self.codes[code] = self.codes.get(code, 0) + 1
        self.slowest = max(self.slowest, (seconds, f"{arguments[0]}: {what}"))

    def copy(self, name: str) -> Path:
        """A copy to change, whose files are hard links; a changed file is written anew."""
        shutil.rmtree(self.work, ignore_errors=True)
        return Path(shutil.copytree(self.root / name, self.work / name, copy_function=os.link))


def snapshot(root: Path, besides: Path) -> dict[str, tuple[int, int]]:
    """The size and the time of change of every file below `root`."""
    found = dict[str, tuple[int, int]]()
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if Path(folder, name) != besides]
        for name in files:
            status = os.lstat(Path(folder, name))
            found[f"{folder}/{name}"] = status.st_size, status.st_mtime_ns
    return found


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Fail when the block takes longer, also while it waits for a pipe."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise AssertionError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("fuzz"))
    made.secret.parent.mkdir()
    made.secret.write_text(json.dumps({"secret": SECRET}))
    folder = write_tiny_checkpoint(made.root / "checkpoint")
    recipe = load_recipe("mobilellm-r1-nano-int4", ["max_context=64"]).to_dict()
    recipe["targets"] = [entry for entry in recipe["targets"] if entry["target"] == TARGET]
    (made.root / "recipes").mkdir()
    recipe_file = made.root / "recipes" / "recipe.yaml"
    recipe_file.write_text(json.dumps(recipe, indent=1))
    bundle = write_tiny_bundle(folder, recipe_file, made.root / "bundle")
    write_sharded(Path(shutil.copytree(folder, made.root / "sharded")))
    # A runtime that starts takes seconds, and so does an export for comparison: most manifests are
    # tried beside a model that is missing, and the checksums beside weights that are missing too.
    for name, missing in (("headless", "model_q4.onnx*"), ("bare", "*.safetensors")):
        shutil.copytree(bundle, made.root / name, ignore=shutil.ignore_patterns(missing))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield made
    added = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if SCALE > 1:
        print(f"\n{made.tried} inputs, exit codes {made.codes}, {added / 1e6:.0f} MB added")
        print(f"slowest: {made.slowest[0]:.2f} s, {made.slowest[1][:300]}")
    assert added < MEMORY


# Changes of a file.

#: JSON and YAML text in the place of a value.
FRAGMENTS: dict[str, str] = {
    **{text: text for text in ("null", "true", "-1", "0", "1", "0.5", "1e9", "1e308", "1e400")},
    **{text: text for text in ("NaN", "-Infinity", "[]", "{}", '""', '[[]]', '{"a": {}}')},
    **{str(n): str(n) for n in (2**31, 2**32 + 1, 2**53, 2**63, 2**64, -(2**63) - 1)},
    "10**300": "1" + "0" * 299,
    "10**400": "1" + "0" * 400,
    "5,001 digits": "9" * 5001,
    "5,001 digits after a point": "0." + "9" * 5001,
    "hexadecimal": "0x" + "f" * 5000,
    "lists 1,000 deep": "[" * 1000 + "]" * 1000,
    "lists 60 deep": "[" * 60 + "]" * 60,
    "objects 5,000 deep": '{"a":' * 5000 + "1" + "}" * 5000,
    "an open list": "[",
    "a long text": '"' + "x" * 100_000 + '"',
    "a long list": "[" + "0," * 50_000 + "0]",
    "a list of texts": '["full_attention", "x", ""]',
    "half of a surrogate pair": '"\\ud800"',
    "a key of half a pair": '{"\\ud800": 1}',
    "escape sequences": '"\\u001b[2J\\u009b31m\\u202e"',
    "a zero character": '"a\\u0000b"',
    "a key twice": '{"a": 1, "a": 2}',
    "a path": '"../../elsewhere/secret.json"',
    "an absolute path": '"/etc/passwd"',
    "a path by name": '{"../../elsewhere/secret.json": "0"}',
    "a scheme": '"int4-g32"',
    "a date": '"2026-13-45"',
}  # fmt: skip
#: What only YAML has.
YAML_FRAGMENTS: dict[str, str] = {
    "an alias": "[&a x, *a]",
    "aliases that grow": "[&a [x,x,x,x,x,x,x,x,x], "
    + ", ".join(
        f"&{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]" for n in range(12)
    ) + "]",
    "an object of Python": "!!python/object/apply:os.system [exit]",
    "a set": "!!set {a, b}",
    "binary": "!!binary YQ==",
    "bad binary": "!!binary '*'",
    "a date without quotes": "2026-13-45",
    "a number to base 60": "1:1:1:1:1:1:1:1:1:1:1:1:1:1:1",
    "not a number": ".nan",
    "infinite": "-.inf",
    "a list as a key": "{[a]: b}",
    "a tag": "!x y",
    "an int by tag": "!!int x",
    "a merge": "{<<: {a: 1}, a: 2}",
    "a second document": "1\n---\n2",
}  # fmt: skip


@dataclass(frozen=True)
class Raw:
    """Text in the place of a value."""

    text: str


class Pairs(list[tuple[str, Any]]):
    """An object of JSON, whose keys may be there twice."""


def dumped(value: Any) -> str:
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, Pairs):
        return "{" + ", ".join(f"{json.dumps(k)}: {dumped(v)}" for k, v in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(dumped, value)) + "]"
    return json.dumps(value)


def places(value: Any) -> list[tuple[Any, int]]:
    """Every (list, index) of the tree."""
    found = list[tuple[Any, int]]()
    for index, entry in enumerate(value if isinstance(value, list) else []):
        found.append((value, index))
        found += places(entry[1] if isinstance(value, Pairs) else entry)
    return found


Change = tuple[str, ...]


def change_structure(
    text: str, draw: Callable[[Any], Any], fragments: dict[str, str]
) -> tuple[str, str]:
    """One change of one place of JSON; returns what was done, and the new text."""
    tree = json.loads(text, object_pairs_hook=Pairs)
    found = places(tree)
    held, index = found[draw(st.integers(0, len(found) - 1))]
    name = draw(st.sampled_from(list(fragments)))
    what = draw(st.sampled_from(("replace", "replace", "replace", "delete", "repeat", "rename")))
    value = Raw(fragments[name])
    if what == "delete":
        del held[index]
    elif not isinstance(held, Pairs):
        held[index] = value
    elif what == "replace":
        held[index] = (held[index][0], value)
    elif what == "repeat":
        held.append((held[index][0], value))
    else:
        keys = ("../../elsewhere/secret.json", "/etc/passwd", "\x1b[2J", "", "a" * 5000, "\ud800")
        held[index] = (draw(st.sampled_from(keys)), held[index][1])
    place = held[index][0] if isinstance(held, Pairs) and index < len(held) else index
    return f"{what} {place!r:.40} ({name})", dumped(tree)


def change_bytes(content: bytes, draw: Callable[[Any], Any]) -> tuple[str, bytes]:
    """One change of the bytes of a file."""
    what = draw(st.sampled_from(("cut", "flip", "insert", "mark", "utf-16", "nothing", "zeros")))
    place = draw(st.integers(0, max(0, len(content) - 1)))
    if what == "cut":
        changed = content[:place]
    elif what == "flip" and content:
        bit = 1 << draw(st.integers(0, 7))
        changed = content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :]
    elif what == "insert":
        junk = draw(
            st.sampled_from((b"\xff", b"\x1b[2J", b"\0", b"[" * 2000, b'"', b"\n", b"9" * 5001))
        )
        changed = content[:place] + junk + content[place:]
    elif what == "mark":
        changed = b"\xef\xbb\xbf" + content
    elif what == "utf-16":
        changed = content.decode("latin-1").encode("utf-16")
    elif what == "zeros":
        changed = b"\0" * len(content)
    else:
        changed = b""
    return f"{what} at {place}", changed


KINDS: dict[str, Callable[[Path, Path], object]] = {
    "missing": lambda path, _: None,
    "a link outside": lambda path, secret: path.symlink_to(secret),
    "a link to a device": lambda path, _: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path, _: path.symlink_to(path.name),
    "a link to nothing": lambda path, _: path.symlink_to("nothing"),
    "a folder": lambda path, _: path.mkdir(),
    "a pipe": lambda path, _: os.mkfifo(path),
    "a huge sparse file": lambda path, _: (path.touch(), os.truncate(path, 1 << 40)),
    "a large file": lambda path, _: path.write_bytes(b"[" + b"[]," * 5_000_000 + b"[]]"),
}


def change(path: Path, secret: Path, draw: Callable[[Any], Any], form: str) -> str:
    """Change one file of a folder; returns what was done."""
    content = path.read_bytes()
    path.unlink()
    how = draw(st.sampled_from(("structure",) * 6 + ("bytes", "bytes", "kind")))
    if how == "kind":
        kind = draw(st.sampled_from(list(KINDS)))
        KINDS[kind](path, secret)
        return f"{path.name} is {kind}"
    if how == "structure" and form != "sums":
        fragments = FRAGMENTS | YAML_FRAGMENTS if form == "yaml" else FRAGMENTS
        head = int.from_bytes(content[:8], "little")
        text = content[8 : 8 + head] if form == "safetensors" else content
        what, changed = change_structure(text.decode(), draw, fragments)
        made = changed.encode("utf-8", "surrogatepass")
        if form == "safetensors":
            made = len(made).to_bytes(8, "little") + made + content[8 + head :]
    elif how == "structure":
        what, made = change_line(content, draw)
    else:
        what, made = change_bytes(content, draw)
    path.write_bytes(made)
    return f"{path.name}: {what}"


def change_line(content: bytes, draw: Callable[[Any], Any]) -> tuple[str, bytes]:
    """One change of a line of SHA256SUMS."""
    lines = content.split(b"\n")
    place = draw(st.integers(0, len(lines) - 1))
    digest, _, name = lines[place].partition(b"  ")
    lines[place] = draw(
        st.sampled_from(
            (
                digest + b"  ../../elsewhere/secret.json",
                digest + b"  /etc/passwd",
                digest + b" *" + name,
                digest + b"  \x1b[2J",
                digest + b"  " + b"a/" * 2000,
                digest.upper() + b"  " + name,
                b"0" * 64 + b"  " + name,
                digest + b"  ./" + name,
                b"\\" + digest + b"  " + name,
                lines[place] + b"\n" + lines[place],
                b"",
                b"a" * 1_000_000,
            )
        )
    )
    return f"line {place}: {lines[place][:90]!r}", b"\n".join(lines)


# What is changed, and the commands that read it.

Commands = Callable[[Path, Path], Sequence[Sequence[object]]]
GENERATE = ("--prompt", "ab", "--max-new-tokens", "2", "--json")


def of_checkpoint(folder: Path, out: Path) -> Sequence[Sequence[object]]:
    recipe = folder.parent.parent / "recipes" / "recipe.yaml"
    return (
        ("inspect", folder),
        ("quantize", recipe, "--checkpoint", folder, "-o", out),
        ("generate", folder, *GENERATE),
    )


def of_recipe(folder: Path, out: Path) -> Sequence[Sequence[object]]:
    checkpoint = folder.parent.parent / "checkpoint"
    return (("quantize", folder / "recipe.yaml", "--checkpoint", checkpoint, "-o", out),)


def of_quantized(bundle: Path, out: Path) -> Sequence[Sequence[object]]:
    quantized = bundle / "quantized"
    return (
        ("verify", quantized),
        ("lower", quantized, "--target", TARGET, "-o", out, "max_context=64"),
        ("generate", quantized, *GENERATE),
    )


def of_artifact(bundle: Path, _: Path) -> Sequence[Sequence[object]]:
    return (("generate", bundle / "onnx", *GENERATE),)


def of_bundle(bundle: Path, _: Path) -> Sequence[Sequence[object]]:
    return (
        ("verify", bundle, "--json"),
        ("generate", bundle, *GENERATE),
        ("profile", bundle, "--device", "host:x"),
    )


FILES: dict[str, tuple[str, str, str, Commands]] = {
    "config": ("checkpoint", "config.json", "json", of_checkpoint),
    "generation config": ("checkpoint", "generation_config.json", "json", of_checkpoint),
    "tokenizer config": ("checkpoint", "tokenizer_config.json", "json", of_checkpoint),
    "weights": ("checkpoint", "model.safetensors", "safetensors", of_checkpoint),
    "index": ("sharded", "model.safetensors.index.json", "json", of_checkpoint),
    "shard": ("sharded", "model-1.safetensors", "safetensors", of_checkpoint),
    "recipe": ("recipes", "recipe.yaml", "yaml", of_recipe),
    "quantized manifest": ("bundle", "quantized/quantization.json", "json", of_quantized),
    "quantized config": ("bundle", "quantized/config.json", "json", of_quantized),
    "quantized weights": ("bundle", "quantized/quantized.safetensors", "safetensors", of_quantized),
    "artifact manifest": ("headless", "onnx/artifact.json", "json", of_artifact),
    "artifact that runs": ("bundle", "onnx/artifact.json", "json", of_artifact),
    "bundle manifest": ("headless", "manifest.json", "json", of_bundle),
    "artifact in a bundle": ("headless", "onnx/artifact.json", "json", of_bundle),
    "quantized in a bundle": ("headless", "quantized/quantization.json", "json", of_bundle),
    "checksums": ("bare", "SHA256SUMS", "sums", of_bundle),
}


@pytest.mark.parametrize(("name", "file", "form", "commands"), FILES.values(), ids=FILES)
@fuzzed
@given(data=st.data())
def test_a_changed_file_ends_no_command_with_a_traceback(
    name: str, file: str, form: str, commands: Commands, data: st.DataObject, world: World
) -> None:
    folder = world.copy(name)
    what = change(folder / file, world.secret, data.draw, form)
    for command in commands(folder, world.work / "out"):
        world.run(what, *command)


@fuzzed
@given(data=st.data())
def test_an_override_ends_no_command_with_a_traceback(data: st.DataObject, world: World) -> None:
    folder = world.copy("recipes")
    recipe = json.loads((folder / "recipe.yaml").read_text())
    keys = [
        f"{part}.{key}" for part in recipe for key in recipe[part] if isinstance(recipe[part], dict)
    ]
    keys += [
        *recipe,
        "targets.0.max_context",
        "targets.0",
        "targets.1",
        "a.b",
        "targets." + "9" * 5000,
    ]
    keys += [
        "a." * 2000 + "a",
        "quantization.overrides.*.x",
        "\udcff",
        "\x1b[2J",
        "profile.depths.0",
    ]
    fragments = list((FRAGMENTS | YAML_FRAGMENTS).values())
    pairs = [
        f"{data.draw(st.sampled_from(keys))}={data.draw(st.sampled_from(fragments))}"
        for _ in range(data.draw(st.integers(1, 2)))
    ]
    arguments = (folder / "recipe.yaml", *pairs, "--checkpoint", world.root / "checkpoint")
    world.run(f"{pairs!r:.200}", "quantize", *arguments, "-o", world.work / "out")
