"""`mobilellm package`: a bundle with measurements and a signature, as a folder or as an archive."""

import os
import shutil
import subprocess
from pathlib import Path

import gating
import pytest
from commands import run
from conftest import NANO

from exporter.bundle.archive import FORMATS
from exporter.bundle.bundle import CHECKSUMS, SIGNATURES, Bundle, file_problems, open_bundle
from exporter.derivation.manifests import check_manifests
from exporter.errors import InputError
from exporter.files import read_json
from exporter.model.checkpoint import open_checkpoint
from exporter.packaging import Request, package
from exporter.pipeline import export
from exporter.progress import no_progress
from exporter.recipe import load_recipe

Capture = pytest.CaptureFixture[str]


def tree_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def result(finished_bundle: Bundle, tmp_path: Path) -> Path:
    """A measurement of the finished bundle."""
    return gating.written(tmp_path / "onnx.json", gating.evaluation(finished_bundle.manifest))


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """A private key; its public key is beside it."""
    private, public = tmp_path / "key.pem", tmp_path / "key.pub"
    make = ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(private)]
    subprocess.run(make, check=True)
    public_key = ["openssl", "ec", "-in", str(private), "-pubout", "-out", str(public)]
    subprocess.run(public_key, check=True, capture_output=True)
    return private


@pytest.mark.parametrize("form", FORMATS)
def test_two_exports_give_the_same_archive_anywhere_and_any_day(
    form: str, finished_bundle: Bundle, result: Path, tmp_path: Path
) -> None:
    checkpoint = Path(shutil.copytree(NANO, tmp_path / "elsewhere" / "checkpoint"))
    for path in checkpoint.iterdir():
        os.utime(path, (0, 0))
        path.chmod(0o600)
    again = tmp_path / "other" / "bundle"
    recipe = load_recipe("mobilellm-r1-nano-int4")
    assert export(recipe, open_checkpoint(checkpoint), again, no_progress).bundle is not None
    os.utime(again / "manifest.json", (1, 1))
    one, other = tmp_path / f"one{form}", tmp_path / "deep" / "er" / f"other{form}"
    for bundle, out in ((finished_bundle.path, one), (again, other)):
        package(bundle, out, Request([result]), no_progress)
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("form", ["", *FORMATS])
def test_a_measurement_is_copied_and_every_document_derived_anew(
    form: str, finished_bundle: Bundle, result: Path, tmp_path: Path
) -> None:
    out = tmp_path / f"packaged{form}"
    packaged = package(finished_bundle.path, out, Request([result]), no_progress)
    assert "results/onnx.json" in packaged.files
    folder = out
    if form:
        folder = tmp_path / "copy"
        package(out, folder, Request(), no_progress)
    before, after = tree_of(finished_bundle.path), tree_of(folder)
    assert after.pop("results/onnx.json") == result.read_bytes()
    assert after.keys() == before.keys()
    changed = {name for name in after if after[name] != before[name]}
    assert {CHECKSUMS, "manifest.json"} <= changed
    assert all("/" not in name for name in changed)
    checks = check_manifests(open_bundle(folder))
    assert [check for check in checks if not check.passed] == []
    assert file_problems(folder) == {}


def test_a_measurement_of_another_bundle_is_refused_and_nothing_is_written(
    finished_bundle: Bundle, tmp_path: Path
) -> None:
    content = gating.evaluation(finished_bundle.manifest)
    content["files"] = dict.fromkeys(content["files"], "0" * 64)
    other = gating.written(tmp_path / "other.json", content)
    out = tmp_path / "out.zip"
    with pytest.raises(InputError, match=r"measured another onnx/\S+ than that of the bundle"):
        package(finished_bundle.path, out, Request([other]), no_progress)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.json"]


@pytest.mark.parametrize("target", ["onnx", "results", "nonsense"])
def test_a_measurement_names_every_file_of_the_model(
    target: str, finished_bundle: Bundle, tmp_path: Path
) -> None:
    """Every model of this tokenizer has the same tokenizer.json."""
    manifest = finished_bundle.manifest
    content = gating.counts(manifest, {"f": 1.0}, target="onnx")
    content["files"] = {"tokenizer.json": manifest.files["onnx/tokenizer.json"].sha256}
    content["target"] = target
    other = gating.written(tmp_path / "other.json", content)
    said = (
        r"does not name onnx/onnx/model_q4\.onnx"
        if target == "onnx"
        else "the bundle does not have"
    )
    with pytest.raises(InputError, match=said):
        package(finished_bundle.path, tmp_path / "out.zip", Request([other]), no_progress)


def test_a_forged_measurement_in_a_bundle_is_named(
    finished_bundle: Bundle, result: Path, tmp_path: Path
) -> None:
    """Whoever adds a measurement by hand can write every hash anew, but not what it measured."""
    import tampering

    folder = tmp_path / "packaged"
    package(finished_bundle.path, folder, Request([result]), no_progress)
    with tampering.edited(folder / "results" / "onnx.json") as content:
        content["files"]["onnx/model_q4.onnx"] = "0" * 64
    tampering.reseal(folder)
    (failed,) = (check for check in check_manifests(open_bundle(folder)) if not check.passed)
    assert failed.subject == "results/onnx.json"


def test_a_damaged_bundle_is_not_packaged(bundle_copy: Path, tmp_path: Path) -> None:
    path = bundle_copy / "onnx" / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    with pytest.raises(InputError, match=r"tokenizer\.json: has sha256"):
        package(bundle_copy, tmp_path / "out.zip", Request(), no_progress)
    assert not (tmp_path / "out.zip").exists()


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("out.tar.gz", "is no kind of archive"),
        ("taken.zip", "exists already"),
        ("folder.zip", "is a folder"),
        ("full", "holds other files"),
    ],
)
def test_an_output_that_would_lose_something_is_refused(
    name: str, problem: str, finished_bundle: Bundle, tmp_path: Path
) -> None:
    (tmp_path / "taken.zip").write_bytes(b"precious")
    for folder in ("folder.zip", "full"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "precious").write_bytes(b"precious")
    with pytest.raises(InputError, match=problem):
        package(finished_bundle.path, tmp_path / name, Request(), no_progress)
    assert (tmp_path / "taken.zip").read_bytes() == b"precious"


def test_an_archive_does_not_replace_itself(finished_bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "nano.zip"
    package(finished_bundle.path, out, Request(), no_progress)
    before = out.read_bytes()
    with pytest.raises(InputError, match="is the bundle that is read"):
        package(out, out, Request(overwrite=True), no_progress)
    assert out.read_bytes() == before


@pytest.mark.parametrize("names", [("a.json", "b/a.json"), ("a.txt",)])
def test_the_name_of_a_measurement_is_checked(
    names: tuple[str, ...], finished_bundle: Bundle, result: Path, tmp_path: Path
) -> None:
    files = [tmp_path / name for name in names]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        shutil.copy(result, file)
    with pytest.raises(InputError, match=r"second results/a\.json|not a \.json file"):
        package(finished_bundle.path, tmp_path / "out", Request(files), no_progress)


def test_a_signature_is_kept_until_a_file_changes(
    finished_bundle: Bundle, result: Path, key: Path, tmp_path: Path
) -> None:
    signed, copied, changed = (tmp_path / f"{name}.zip" for name in ("signed", "copied", "changed"))
    assert package(finished_bundle.path, signed, Request(private_key=key), no_progress).signed
    assert package(signed, copied, Request(), no_progress).signed
    assert signed.read_bytes() == copied.read_bytes()
    packaged = package(signed, changed, Request([result]), no_progress)
    assert not packaged.signed
    assert not set(SIGNATURES) & set(packaged.files)


def test_verify_wants_the_signature_of_the_key(
    finished_bundle: Bundle, key: Path, tmp_path: Path, capsys: Capture
) -> None:
    public, other = key.with_suffix(".pub"), tmp_path / "other.pub"
    (tmp_path / "more").mkdir()
    shutil.copy(public, other)
    signed = tmp_path / "signed.tar.zst"
    package(finished_bundle.path, signed, Request(private_key=key), no_progress)
    quick = ("verify", "--quick", "--json")
    assert run(capsys, *quick, signed, "--key", public).code == 0
    outcome = run(capsys, *quick, finished_bundle.path, "--key", public)
    assert outcome.code == 1
    (failed,) = (check for check in outcome.json["checks"] if not check["passed"])
    assert failed["check"] == "signature"
    assert "is missing: the bundle is not signed" in failed["note"]
    assert run(capsys, *quick, signed, "--key", tmp_path / "none.pub").code == 2


def test_a_damaged_archive_fails_verification(
    finished_bundle: Bundle, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "nano.tar.zst"
    package(finished_bundle.path, out, Request(), no_progress)
    content = bytearray(out.read_bytes())
    content[len(content) // 2] ^= 1
    out.write_bytes(content)
    outcome = run(capsys, "verify", "--json", out)
    assert outcome.code == 1
    assert outcome.json["checks"][0]["check"] == "archive"
    assert run(capsys, "verify", tmp_path / "none.zip").code == 2


def test_the_manifest_names_every_file_and_every_weight(finished_bundle: Bundle) -> None:
    manifest, folder = finished_bundle.manifest, finished_bundle.path
    beside = {"manifest.json", CHECKSUMS}
    assert manifest.files.keys() == tree_of(folder).keys() - beside
    for name, entry in manifest.files.items():
        assert entry.bytes == (folder / name).stat().st_size
    assert manifest.weights.keys() == finished_bundle.quantized.config.parameter_shapes().keys()
    weight = manifest.weights["model.layers.0.self_attn.q_proj.weight"]
    rows, columns = weight.shape
    assert weight.bytes == rows * columns // 2 + 2 * rows * columns // 32
    assert manifest.weights["model.norm.weight"].reason == "a normalization weight, one vector"
    assert 4.5 <= manifest.bits_per_weight() < 4.6
    assert read_json(folder / "manifest.json")["model"]["parameters"] == manifest.model.parameters


def test_a_bundle_names_the_hub_id_that_its_checkpoint_was_given_by(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: NANO)
    out, model = tmp_path / "bundle", "facebook/MobileLLM-R1-140M"
    typed = ("mobilellm-r1-nano-int4", "--checkpoint", model, "--target", "onnx", "-o", out)
    assert run(capsys, "export", *typed).code == 0
    assert open_bundle(out).manifest.recipe["model"] == model
    assert f'base_model: "{model}"' in (out / "README.md").read_text()
