"""Damage and attacks on a packaged bundle, as a folder and as an archive: what verify names.

Most of it needs no runtime: the hashes of all files, then the codes and scales of the artifact that
was hit. The places of the weights in a file are read here with the libraries of its format.
"""

import json
import os
import random
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import pytest
from commands import flip, run
from coremltools.proto import Model_pb2
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from executorch.exir._serialize import _program as pte
from gating import evaluation, profile, written
from programs import read_parts

from exporter.bundle.archive import FORMATS, opened, pack
from exporter.bundle.bundle import CHECKSUMS, SIGNATURES, Bundle, open_bundle
from exporter.bundle.manifest import MANIFEST
from exporter.bundle.signature import Signer
from exporter.errors import InputError
from exporter.packaging import Request, package
from exporter.progress import no_progress
from exporter.verification.checks import (
    Check,
    check_bundle_files,
    check_quantized,
    check_signature,
    failures,
)
from exporter.verification.integers import check_integers

#: Flips at random places, besides one in every file.
PLACES = 200
WEIGHTS, MODEL = "quantized/quantized.safetensors", "executorch/model.pte"
GRAPH, DATA = "onnx/onnx/model_q4.onnx", "onnx/onnx/model_q4.onnx_data"
MLPACKAGE = "coreml/model.mlpackage/Data/com.apple.CoreML"

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def packaged(finished_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The demo bundle with measurements and signatures, as `package` writes it: a folder and both
    archives, and the ``key.pub``. In memory, since it is hashed hundreds of times."""
    folder, memory = tmp_path_factory.mktemp("packaged"), Path("/dev/shm")
    manifest = finished_bundle.manifest
    times = {("prefill", 64): [10.0, 11.0], ("decode", 16): [2.0, 2.5]}
    results = [
        written(folder / "onnx.json", evaluation(manifest)),
        written(folder / "host.json", profile(manifest, times)),
    ]
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else folder) as made:
        key = ec.generate_private_key(ec.SECP256R1())
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        Path(made, "key.pem").write_bytes(private)
        Path(made, "key.pub").write_bytes(public)
        signed = Request(results, Path(made, "key.pem"))
        package(finished_bundle.path, Path(made, "nano"), signed, no_progress)
        for suffix in FORMATS:
            package(Path(made, "nano"), Path(made, f"nano{suffix}"), Request(), no_progress)
        yield Path(made)


@pytest.fixture
def bundle(packaged: Path) -> Iterator[Path]:
    """A copy of the folder."""
    copy = Path(shutil.copytree(packaged / "nano", packaged / "copy"))
    yield copy
    shutil.rmtree(copy)


def files_of(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )


def failed_files(folder: Path) -> list[str]:
    """The subjects of the checks of files that failed."""
    return [check.subject for check in failures(check_bundle_files(folder))]


def failed_signatures(folder: Path) -> set[str]:
    """What the checks of signatures name."""
    signer = Signer(folder.parent / "key.pub")
    return {check.subject for check in failures(check_signature(folder, signer))}


def damaged_weights(folder: Path, part: str) -> set[str]:
    """The weights that verify names for damage in one artifact, or in the quantized checkpoint,
    which differs from each artifact then: one is enough. A file that is no model any more names
    none."""
    try:
        bundle = open_bundle(folder)
    except InputError:
        return set()
    checks = list[Check](check_quantized(bundle.quantized))
    for target, finished in bundle.artifacts.items():
        if target == {"quantized": "onnx"}.get(part, part):
            checks += check_integers(bundle.quantized, finished, lambda _: None)
    return {check.subject.split(" (")[0] for check in failures(checks)}


# Where the weights are.

Range = tuple[int, int, set[str]]


def in_safetensors(path: Path) -> Iterator[Range]:
    content = path.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    for name, entry in header.items():
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        yield start, end, {name.removesuffix(".scales").removesuffix(".codes")}


def in_onnx(path: Path, names: set[str]) -> Iterator[Range]:
    """In the file of external data, or in the graph's own. A product of several weights has their
    names, joined."""
    model = onnx.load(path.parent / "model_q4.onnx", load_external_data=False)
    content = path.read_bytes()
    for tensor in model.graph.initializer:
        held = {name for part in tensor.name.split("+") if (name := stem(part)) in names}
        place = {
            entry.key: int(entry.value) for entry in tensor.external_data if entry.value.isdigit()
        }
        if path.name.endswith("_data") and place and held:
            yield place["offset"], place["offset"] + place["length"], held
        elif path.suffix == ".onnx" and len(tensor.raw_data) > 64 and held:
            start = content.index(tensor.raw_data)
            yield start, start + len(tensor.raw_data), held


def stem(name: str) -> str:
    """The weight that a tensor of a graph belongs to: ``a.weight.scales`` → ``a.weight``."""
    return name[: name.index(".weight") + 7] if ".weight" in name else name


def in_pte(path: Path, names: set[str]) -> Iterator[Range]:
    header = pte._get_extended_header(path.read_bytes()[:64])
    assert header is not None
    program = read_parts(path).program
    for named in program.named_data or []:
        segment = program.segments[named.segment_index]
        start = header.segment_base_offset + segment.offset
        if stem(named.key) in names:
            yield start, start + segment.size, {stem(named.key)}


def in_mlpackage(path: Path, names: set[str]) -> Iterator[Range]:
    """A blob of the weight file has a header of 64 bytes, to which the program points."""
    written_as = {name.replace(".", "_"): name for name in names}
    specification = Model_pb2.Model.FromString((path.parent.parent / "model.mlmodel").read_bytes())
    content = path.read_bytes()
    for function in specification.mlProgram.functions.values():
        for block in function.block_specializations.values():
            for operation in block.operations:
                held = written_as.get(operation.outputs[0].name if operation.outputs else "")
                values = [*operation.attributes.values()]
                values += [a.value for i in operation.inputs.values() for a in i.arguments]
                for value in values:
                    if held and value.WhichOneof("value") == "blobFileValue":
                        _, _, size, start = struct.unpack_from(
                            "<2I2Q", content, value.blobFileValue.offset
                        )
                        yield start, start + size, {held}


def weights_by_place(folder: Path) -> dict[str, list[Range]]:
    """file → the ranges of bytes that hold weights."""
    names = set(open_bundle(folder).quantized.schemes)
    blobs = f"{MLPACKAGE}/weights/weight.bin"
    return {
        WEIGHTS: list(in_safetensors(folder / WEIGHTS)),
        DATA: list(in_onnx(folder / DATA, names)),
        GRAPH: list(in_onnx(folder / GRAPH, names)),
        MODEL: list(in_pte(folder / MODEL, names)),
        blobs: list(in_mlpackage(folder / blobs, names)),
    }


def test_the_places_of_all_weights_are_known(packaged: Path) -> None:
    """Each format has each weight, and weights are most of its file."""
    names = set(open_bundle(packaged / "nano").quantized.schemes)
    places = weights_by_place(packaged / "nano")
    for files in (
        (WEIGHTS,),
        (DATA, GRAPH),
        (MODEL,),
    ):
        assert set().union(*(held for file in files for *_, held in places[file])) >= names, files
    for file in (WEIGHTS, DATA, MODEL, f"{MLPACKAGE}/weights/weight.bin"):
        held = {place for start, end, _ in places[file] for place in range(start, end)}
        assert len(held) > 0.6 * (packaged / "nano" / file).stat().st_size, file


# Flips.


def flips(folder: Path) -> list[tuple[str, int, int]]:
    """(file, place, bits): one in every file, and `PLACES` of all bytes of the bundle."""
    noise, names = random.Random(16), files_of(folder)
    sizes = [(folder / name).stat().st_size for name in names]
    chosen = names + noise.choices(names, sizes, k=PLACES)
    return [
        (name, noise.randrange((folder / name).stat().st_size), noise.randint(1, 255))
        for name in chosen
    ]


def test_a_flipped_byte_is_named_with_its_file_and_its_weight(bundle: Path) -> None:
    places, counts = weights_by_place(bundle), {"files": 0, "weights": 0}
    for name, place, bits in flips(bundle):
        path = bundle / name
        with changed(path, place, bits):
            counts["files"] += 1
            if name in SIGNATURES:  # found with the public key alone
                assert name in failed_signatures(bundle), (name, place, bits)
                continue
            assert failed_files(bundle) == [name], (name, place, bits)
            held = [held for start, end, held in places.get(name, []) if start <= place < end]
            if held:
                found = damaged_weights(bundle, name.split("/")[0])
                assert len(found) == 1, (name, place, bits, found)
                assert found <= set().union(*held), (name, place, bits, found)
                counts["weights"] += 1
    assert counts["files"] == PLACES + len(files_of(bundle))
    assert counts["weights"] > PLACES / 2
    assert failed_files(bundle) == []
    assert failed_signatures(bundle) == set()


class changed:  # noqa: N801  # reads as a statement
    """One byte of a file is another while the block runs."""

    def __init__(self, path: Path, place: int, bits: int) -> None:
        self._path, self._place, self._bits = path, place, bits

    def _change(self) -> None:
        with self._path.open("r+b") as file:
            file.seek(self._place)
            byte = file.read(1)[0]
            file.seek(self._place)
            file.write(bytes([byte ^ self._bits]))

    def __enter__(self) -> None:
        self._change()

    def __exit__(self, *_: object) -> None:
        self._change()


def test_a_flipped_byte_of_the_lists_of_hashes_is_named_with_the_list(bundle: Path) -> None:
    """Both lists have the hash of every file: it is known which of them is wrong."""
    noise = random.Random(17)
    lines = (bundle / CHECKSUMS).read_bytes()
    places = {CHECKSUMS: noise.sample(range(len(lines)), 150)}
    places[CHECKSUMS] += [
        lines.index(b"  manifest.json") + offset for offset in (-64, -1, 0, 3, 12)
    ]
    places[MANIFEST] = noise.sample(range((bundle / MANIFEST).stat().st_size), 100)
    for name, chosen in places.items():
        for place in chosen:
            bits = noise.randint(1, 255)
            with changed(bundle / name, place, bits):
                assert failed_files(bundle) == [name], (name, place, bits)


@pytest.mark.parametrize(("name", "suffix"), [(WEIGHTS, ""), (MODEL, ".tar.zst")])
def test_the_command_names_the_file_and_the_weight(
    name: str, suffix: str, bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    start, end, (weight,) = weights_by_place(bundle)[name][20]
    flip(bundle / name, (start + end) // 2)
    given = tmp_path / f"nano{suffix}" if suffix else bundle
    if suffix:
        pack(bundle, given, files_of(bundle))
    outcome = run(capsys, "verify", given, "--quick", "--json")
    assert outcome.code == 1
    found = [check for check in outcome.json["checks"] if not check["passed"]]
    assert [check["subject"] for check in found if check["check"] == "files"] == [name]
    named = {check["subject"].split(" (")[0] for check in found if check["check"] == "integers"}
    assert named == {weight}
    assert str(Path(tempfile.gettempdir(), "mobilellm-")) not in outcome.out


# Attacks on the list of files: on the folder, and in an archive that is packed as ours is.


def remove(path: Path) -> None:
    path.unlink()


def rename(path: Path) -> None:
    path.rename(path.with_name("renamed"))


def move(path: Path) -> None:
    path.rename(path.parent.parent / "moved")


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\n")


def exchange(path: Path) -> None:
    path.write_bytes(b"{}")


CHANGES = (remove, rename, move, truncate, empty, append, exchange)
#: One file of each kind, and the lists themselves.
VICTIMS = (
    WEIGHTS, "quantized/quantization.json", "quantized/config.json", MODEL, "onnx/artifact.json",
    DATA, f"{MLPACKAGE}/weights/weight.bin", "results/host.json",
    "README.md", "provenance.json", MANIFEST, CHECKSUMS,
)  # fmt: skip


def verdict(folder: Path) -> set[str]:
    """What verify names of a folder or an archive; raises InputError where the command refuses."""
    with opened(folder) as found:
        return {check.subject for check in failures(check_bundle_files(found))}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_is_missing_or_changed_is_named(
    change: Callable[[Path], None], packaged: Path, bundle: Path, tmp_path: Path
) -> None:
    for name in VICTIMS:
        path = bundle / name
        change(path)
        suffixes = FORMATS if name == VICTIMS[0] else (".zip",)  # which is packed faster
        for form in (bundle, *(tmp_path / f"a{suffix}" for suffix in suffixes)):
            if form != bundle:
                pack(bundle, form, files_of(bundle))
            if name == CHECKSUMS and change in (remove, rename, move):
                with pytest.raises(InputError, match="export did not finish"):
                    verdict(form)
            else:
                found = verdict(form)
                assert name in found, (name, found)
                besides = {part for part in found if not name.startswith(part)}
                assert {Path(part).name for part in besides} <= {"renamed", "moved"}, found
        for left in {*files_of(bundle)} - {*files_of(packaged / "nano")}:
            (bundle / left).unlink()
        shutil.copyfile(packaged / "nano" / name, path)


@pytest.mark.parametrize(
    "name", ["added", "onnx/onnx/model_q4.onnx.bak", "results/x.json", ".hidden", "a/b"]
)
def test_a_file_that_is_added_is_named(name: str, bundle: Path, tmp_path: Path) -> None:
    (bundle / name).parent.mkdir(exist_ok=True)
    (bundle / name).write_bytes(b"{}")
    assert verdict(bundle) == {name}
    for suffix in FORMATS:
        pack(bundle, tmp_path / f"a{suffix}", files_of(bundle))
        assert verdict(tmp_path / f"a{suffix}") == {name}


def link_outside(path: Path, secret: Path) -> None:
    path.unlink()
    path.symlink_to(secret)


def link_inside(path: Path, secret: Path) -> None:
    path.rename(path.with_name("real"))
    path.symlink_to("real")


def link_to_a_folder(path: Path, secret: Path) -> None:
    shutil.rmtree(path.parent)
    path.parent.symlink_to(secret.parent)


def pipe(path: Path, secret: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("make", [link_outside, link_inside, link_to_a_folder, pipe])
@pytest.mark.parametrize("name", [GRAPH, "quantized/config.json", "results/host.json"])
def test_a_link_or_a_pipe_in_a_folder_is_named_and_not_packed(
    make: Callable[[Path, Path], None], name: str, bundle: Path, tmp_path: Path
) -> None:
    secret = tmp_path / "home" / Path(name).name
    secret.parent.mkdir()
    shutil.copyfile(bundle / name, secret)  # also if the content is the right one
    names = files_of(bundle)
    make(bundle / name, secret)
    linked = str(Path(name).parent) if make is link_to_a_folder else name
    assert linked in verdict(bundle)
    for suffix in FORMATS:
        with pytest.raises(InputError):
            pack(bundle, tmp_path / f"a{suffix}", names)
        assert not (tmp_path / f"a{suffix}").exists()


@pytest.mark.parametrize(
    "line", [b"../home/secret", b"/etc/passwd", b"onnx/../../home/secret", b"./a", b"a\\b", b"a//b"]
)
def test_a_name_that_leads_out_in_the_list_is_refused(line: bytes, bundle: Path) -> None:
    with (bundle / CHECKSUMS).open("ab") as file:
        file.write(b"0" * 64 + b"  " + line + b"\n")
    assert verdict(bundle) == {CHECKSUMS}


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_command_refuses_a_damaged_archive(
    suffix: str, packaged: Path, tmp_path: Path, capsys: Capture
) -> None:
    """By its own checks, before anything of the bundle is read; the attacks on the formats are in
    test_attack_archive.py."""
    content = (packaged / f"nano{suffix}").read_bytes()
    noise, path = random.Random(18), tmp_path / f"nano{suffix}"
    for number in range(20):
        place = noise.randrange(len(content))
        bits = noise.randint(1, 255)
        path.write_bytes(content[:place] + bytes([content[place] ^ bits]) + content[place + 1 :])
        if number % 2:
            path.write_bytes(content[:place])
        outcome = run(capsys, "verify", path, "--quick", "--json")
        assert outcome.code == 1
        (check,) = outcome.json["checks"]
        assert check["check"] == "archive"
        assert check["subject"].startswith(str(path))


def test_profile_opens_an_archive_before_it_looks_for_the_device(
    packaged: Path, tmp_path: Path, capsys: Capture
) -> None:
    outcome = run(capsys, "profile", packaged / "nano.zip", "--device", "host:x", "--json")
    assert outcome.code == 2
    assert outcome.json["error"].startswith("--device host:x")
    damaged = tmp_path / "nano.zip"
    damaged.write_bytes((packaged / "nano.zip").read_bytes()[:-1])
    outcome = run(capsys, "profile", damaged, "--device", "host:x", "--json")
    assert outcome.code == 2
    assert outcome.json["error"].startswith(f"{damaged}: is truncated")


def test_both_archives_hold_the_folder(packaged: Path) -> None:
    expected = {
        name: (packaged / "nano" / name).read_bytes() for name in files_of(packaged / "nano")
    }
    for suffix in FORMATS:
        with opened(packaged / f"nano{suffix}") as found:
            assert {name: (found / name).read_bytes() for name in files_of(found)} == expected
