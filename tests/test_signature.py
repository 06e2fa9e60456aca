"""Signed bundles: what a signature covers, what is refused, and that other tools agree."""

import base64
import json
import os
import random
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from commands import run
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from model_signing import hashing, signing

from exporter.bundle.bundle import Bundle
from exporter.bundle.provenance import PROVENANCE
from exporter.bundle.signature import (
    ENVELOPE,
    MODEL_SIGNATURE,
    Signer,
    identity_findings,
    key_findings,
    sign,
    sign_keyless,
)
from exporter.errors import InputError, MissingExtraError
from exporter.verification.checks import check_signature

FILES = {
    "SHA256SUMS": "hashes\n",
    "manifest.json": "{}\n",
    PROVENANCE: '{"_type": "https://in-toto.io/Statement/v1"}\n',
    "onnx/model.onnx": "a graph\n",
    "onnx/tokenizer.json": "a tokenizer\n",
    "quantized/quantized.safetensors": "codes and scales\n",
}


@dataclass(frozen=True)
class Keys:
    private: Path
    public: Path


def write_keys(
    folder: Path,
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey,
    encryption: KeySerializationEncryption | None = None,
) -> Keys:
    folder.mkdir(parents=True, exist_ok=True)
    keys = Keys(folder / "key.pem", folder / "key.pub")
    form = (Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption())
    keys.private.write_bytes(key.private_bytes(*form))
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    keys.public.write_bytes(public)
    return keys


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return write_keys(tmp_path_factory.mktemp("keys"), ec.generate_private_key(ec.SECP256R1()))


@pytest.fixture
def others(tmp_path: Path) -> Keys:
    """The keys of somebody else."""
    return write_keys(tmp_path / "others", ec.generate_private_key(ec.SECP256R1()))


@pytest.fixture
def unsigned(tmp_path: Path) -> Path:
    """A folder with the files of a bundle, as far as a signature knows them."""
    folder = tmp_path / "nano"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


@pytest.fixture
def signed(unsigned: Path, keys: Keys) -> Path:
    sign(unsigned, keys.private)
    assert wrong(unsigned, keys) == {}
    return unsigned


def wrong(folder: Path, keys: Keys) -> dict[str, str]:
    """The findings that speak against a signature."""
    found = key_findings(folder, keys.public)
    assert MODEL_SIGNATURE in found
    return {name: problem for name, problem in found.items() if problem}


def model_signing(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command of the package, which knows nothing of this tool."""
    command = [sys.executable, "-m", "model_signing", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")


def verify_key(folder: Path, keys: Keys) -> subprocess.CompletedProcess[str]:
    signature = ("--signature", folder / MODEL_SIGNATURE)
    return model_signing("verify", "key", folder, *signature, "--public_key", keys.public)


# Other tools.


def test_a_bundle_signed_by_us_verifies_with_model_signing_alone(signed: Path, keys: Keys) -> None:
    outcome = verify_key(signed, keys)
    assert (outcome.returncode, outcome.stderr) == (0, "")
    (signed / "onnx" / "model.onnx").write_text("another graph\n")
    outcome = verify_key(signed, keys)
    assert outcome.returncode == 1
    assert "Hash mismatch for 'onnx/model.onnx'" in outcome.stderr


def test_a_bundle_signed_by_model_signing_verifies_with_us(unsigned: Path, keys: Keys) -> None:
    signature = ("--signature", unsigned / MODEL_SIGNATURE)
    outcome = model_signing("sign", "key", unsigned, *signature, "--private_key", keys.private)
    assert outcome.returncode == 0, outcome.stderr
    assert key_findings(unsigned, keys.public) == {MODEL_SIGNATURE: ""}


def test_openssl_verifies_the_signature_of_the_provenance(
    signed: Path, keys: Keys, tmp_path: Path
) -> None:
    """An envelope is a signature over this text, by the protocol of DSSE."""
    envelope = json.loads((signed / ENVELOPE).read_text())
    kind, payload = envelope["payloadType"], base64.b64decode(envelope["payload"])
    assert payload == (signed / PROVENANCE).read_bytes()
    text = f"DSSEv1 {len(kind)} {kind} {len(payload)} ".encode() + payload
    (tmp_path / "text").write_bytes(text)
    (tmp_path / "sig").write_bytes(base64.b64decode(envelope["signatures"][0]["sig"]))
    command = ["openssl", "dgst", "-sha256", "-verify", str(keys.public), "-signature"]
    outcome = subprocess.run(
        [*command, str(tmp_path / "sig"), str(tmp_path / "text")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert outcome.stdout == "Verified OK\n", outcome.stderr


# What a signature covers.


def test_a_signature_covers_every_file_and_the_envelope(signed: Path) -> None:
    bundle = json.loads((signed / MODEL_SIGNATURE).read_text())
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    covered = [resource["name"] for resource in statement["predicate"]["resources"]]
    assert sorted(covered) == sorted([*FILES, ENVELOPE])


def test_signing_again_replaces_the_signature(signed: Path, others: Keys, keys: Keys) -> None:
    (signed / "manifest.json").write_text('{"more": 1}\n')
    sign(signed, others.private)
    assert wrong(signed, others) == {}
    assert wrong(signed, keys).keys() == {MODEL_SIGNATURE, ENVELOPE}
    assert sorted(path.name for path in signed.iterdir() if path.is_file()) == sorted(
        [*(name for name in FILES if "/" not in name), MODEL_SIGNATURE, ENVELOPE]
    )


@pytest.mark.parametrize("curve", [ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name)
def test_longer_keys_sign_too(curve: ec.EllipticCurve, unsigned: Path, tmp_path: Path) -> None:
    longer = write_keys(tmp_path / "longer", ec.generate_private_key(curve))
    sign(unsigned, longer.private)
    assert key_findings(unsigned, longer.public) == {MODEL_SIGNATURE: "", ENVELOPE: ""}


def test_a_folder_may_be_given_as_a_link(signed: Path, keys: Keys, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(signed)
    assert wrong(tmp_path / "link", keys) == {}
    sign(tmp_path / "link", keys.private)
    assert wrong(signed, keys) == {}


# Attacks: the finding names the file.


def change(folder: Path) -> None:
    (folder / "onnx" / "model.onnx").write_text("another graph\n")


def truncate(folder: Path) -> None:
    os.truncate(folder / "onnx" / "model.onnx", 3)


def remove(folder: Path) -> None:
    (folder / "onnx" / "model.onnx").unlink()


def add(folder: Path) -> None:
    (folder / "onnx" / "more.bin").write_text("more\n")


def add_file_of_git(folder: Path) -> None:
    (folder / ".gitattributes").write_text("* filter=evil\n")


def add_folder_of_git(folder: Path) -> None:
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("[core]\n")


def rename(folder: Path) -> None:
    (folder / "onnx" / "model.onnx").rename(folder / "onnx" / "other.onnx")


def change_checksums(folder: Path) -> None:
    (folder / "SHA256SUMS").write_text("other hashes\n")


def remove_envelope(folder: Path) -> None:
    (folder / ENVELOPE).unlink()


def link(folder: Path) -> None:
    copy = folder.parent / "elsewhere"
    (folder / "onnx" / "model.onnx").rename(copy)
    (folder / "onnx" / "model.onnx").symlink_to(copy)


def link_signature(folder: Path) -> None:
    copy = folder.parent / "elsewhere"
    (folder / MODEL_SIGNATURE).rename(copy)
    (folder / MODEL_SIGNATURE).symlink_to(copy)


def pipe(folder: Path) -> None:
    (folder / PROVENANCE).unlink()
    os.mkfifo(folder / PROVENANCE)


def remove_signature(folder: Path) -> None:
    (folder / MODEL_SIGNATURE).unlink()


MODEL = "onnx/model.onnx"


@pytest.mark.parametrize(
    ("attack", "name", "problem"),
    [
        (change, MODEL, "has sha256 "),
        (truncate, MODEL, "has sha256 "),
        (remove, MODEL, "is missing"),
        (rename, MODEL, "is missing"),
        (rename, "onnx/other.onnx", "is not covered by model.sig"),
        (add, "onnx/more.bin", "is not covered by model.sig"),
        (add_file_of_git, ".gitattributes", "is not covered by model.sig"),
        (add_folder_of_git, ".git/config", "is not covered by model.sig"),
        (change_checksums, "SHA256SUMS", "has sha256 "),
        (remove_envelope, ENVELOPE, "is missing"),
        (link, MODEL, "is a link"),
        (link_signature, MODEL_SIGNATURE, "is a link"),
        (pipe, PROVENANCE, "is not a regular file"),
        (remove_signature, MODEL_SIGNATURE, "is missing: the bundle is not signed"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_changed_bundle_is_refused_and_the_file_is_named(
    attack: Callable[[Path], None], name: str, problem: str, signed: Path, keys: Keys
) -> None:
    attack(signed)
    found = wrong(signed, keys)
    assert problem in found[name]
    assert MODEL_SIGNATURE in found


def test_a_wrong_key_is_refused(signed: Path, others: Keys) -> None:
    found = wrong(signed, others)
    assert found.keys() == {MODEL_SIGNATURE, ENVELOPE}
    assert "Key mismatch" in found[MODEL_SIGNATURE]
    assert "has no valid signature of this key" in found[ENVELOPE]


def test_a_wrong_key_that_the_signature_claims_is_the_right_one_is_refused(
    signed: Path, keys: Keys, others: Keys
) -> None:
    """The hint of a key is text that anyone can write."""
    sign(signed, others.private)
    content = json.loads((signed / MODEL_SIGNATURE).read_text())
    mine = Path(shutil.copytree(signed, signed.parent / "mine"))
    sign(mine, keys.private)
    content["verificationMaterial"] = json.loads((mine / MODEL_SIGNATURE).read_text())[
        "verificationMaterial"
    ]
    (signed / MODEL_SIGNATURE).write_text(json.dumps(content))
    assert "InvalidSignature" in wrong(signed, keys)[MODEL_SIGNATURE]


def test_the_signature_of_another_bundle_is_refused(
    signed: Path, keys: Keys, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(signed, tmp_path / "other"))
    change(other)
    sign(other, keys.private)
    shutil.copyfile(other / MODEL_SIGNATURE, signed / MODEL_SIGNATURE)
    assert {MODEL_SIGNATURE, MODEL} <= wrong(signed, keys).keys()


@pytest.mark.parametrize("ignored", ["onnx", "onnx/model.onnx", ".", "SHA256SUMS"])
def test_a_signature_that_leaves_files_out_is_refused(
    ignored: str, unsigned: Path, keys: Keys, tmp_path: Path
) -> None:
    """Such a signature says itself what to ignore, and model_signing follows it."""
    paths = [MODEL_SIGNATURE, ignored]
    config = signing.Config().use_elliptic_key_signer(private_key=keys.private)
    config.set_hashing_config(hashing.Config().set_ignored_paths(paths=paths))
    config.sign(unsigned, unsigned / MODEL_SIGNATURE)
    if ignored == "onnx":
        assert verify_key(unsigned, keys).returncode == 0
    found = wrong(unsigned, keys)
    left_out = {name for name in FILES if ignored == "." or name.startswith(ignored)}
    assert found.keys() == {MODEL_SIGNATURE, *left_out}
    assert sorted(left_out)[0] in found[MODEL_SIGNATURE]


def test_a_signature_by_a_certificate_or_an_identity_is_not_one_by_a_key(
    signed: Path, keys: Keys
) -> None:
    with_content(
        signed, lambda bundle: bundle.update(verificationMaterial={"certificate": {"rawBytes": ""}})
    )
    assert wrong(signed, keys)[MODEL_SIGNATURE] == "was not signed with a key"


def with_content(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    path = folder / MODEL_SIGNATURE
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


MATERIAL = '"verificationMaterial": {"publicKey": {"hint": "00"}}'


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\x00", b"\xff\xfe", b"null", b"[]", b"7", b"{}", b'"model.sig"', b"{" * 100,
        b"[" * 200_000, b'{"a": 1, "a": 2}', b'{"verificationMaterial": null}',
        b'{"verificationMaterial": {"publicKey": null}}', f"{{{MATERIAL}}}".encode(),
        f'{{{MATERIAL}, "dsseEnvelope": []}}'.encode(),
        f'{{{MATERIAL}, "dsseEnvelope": {{"payload": 7, "signatures": []}}}}'.encode(),
        f'{{{MATERIAL}, "dsseEnvelope": {{"payload": "!", "signatures": []}}}}'.encode(),
        f'{{{MATERIAL}, "dsseEnvelope": {{"payload": "e30=", "signatures": []}}}}'.encode(),
        f'{{{MATERIAL}, "dsseEnvelope": {{"payload": "e30=", "signatures": 7}}}}'.encode(),
    ],
    ids=lambda content: ascii(content[:40]),
)  # fmt: skip
def test_a_malformed_signature_file_is_a_failed_check(
    content: bytes, signed: Path, keys: Keys
) -> None:
    (signed / MODEL_SIGNATURE).write_bytes(content)
    (check,) = (one for one in check_signature(signed, Signer(keys.public)) if not one.passed)
    assert (check.check, check.subject, check.value) == ("signature", MODEL_SIGNATURE, 1)
    assert check.note


def test_an_oversized_signature_file_is_not_read(signed: Path, keys: Keys) -> None:
    os.truncate(signed / MODEL_SIGNATURE, 1 << 40)
    assert "larger than the limit" in wrong(signed, keys)[MODEL_SIGNATURE]


def test_any_changed_byte_of_a_signature_file_is_found(signed: Path, keys: Keys) -> None:
    path, rng = signed / MODEL_SIGNATURE, random.Random(0)
    content = path.read_bytes()
    # The last character of base64 before its padding has bits that stand for nothing.
    padded = [place - 1 for place in range(len(content)) if content[place - 1 : place + 1] == b'="']
    places = [*padded, *(place - 1 for place in padded), *rng.sample(range(len(content)), 60)]
    for place in places:
        for bit in (1, 2, 4, 32):
            changed = bytearray(content)
            changed[place] ^= bit
            path.write_bytes(changed)
            assert MODEL_SIGNATURE in wrong(signed, keys), (place, bit)


def test_an_envelope_of_another_provenance_is_refused(
    signed: Path, keys: Keys, tmp_path: Path
) -> None:
    """Also if it is covered by a valid signature of the same key."""
    other = Path(shutil.copytree(signed, tmp_path / "other"))
    (other / PROVENANCE).write_text('{"another": 1}\n')
    sign(other, keys.private)
    shutil.copyfile(other / ENVELOPE, signed / ENVELOPE)
    sign_alone(signed, keys)
    assert wrong(signed, keys) == {ENVELOPE: "holds another text than provenance.json"}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{}", "has no valid signature of this key"),
        ("[]", "holds a list, not an object"),
        ('{"payload": "e30=", "payloadType": "a", "signatures": []}', "has no valid signature"),
        ('{"payload": 7, "payloadType": "a", "signatures": 7}', "has no valid signature"),
        ("[" * 100_000, "is nested deeper"),
    ],
    ids=["empty", "list", "unsigned", "numbers", "deep"],
)
def test_a_malformed_envelope_is_refused(
    content: str, problem: str, signed: Path, keys: Keys
) -> None:
    (signed / ENVELOPE).write_text(content)
    sign_alone(signed, keys)
    assert problem in wrong(signed, keys)[ENVELOPE]


def sign_alone(folder: Path, keys: Keys) -> None:
    """Write ``model.sig`` over what is there, as another tool would."""
    config = signing.Config().use_elliptic_key_signer(private_key=keys.private)
    config.set_hashing_config(hashing.Config().set_ignored_paths(paths=[MODEL_SIGNATURE]))
    config.sign(folder, folder / MODEL_SIGNATURE)


# The command line.


def test_a_bundle_is_signed_and_verified_by_commands(
    finished_bundle: Bundle, keys: Keys, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = finished_bundle.path, tmp_path / "nano"
    packaged = run(capsys, "package", path, "--sign", keys.private, "-o", out, "--json")
    assert packaged.code == 0
    assert packaged.json["signed"] is True
    assert verify_key(out, keys).returncode == 0
    verified = run(capsys, "verify", "--quick", out, "--key", keys.public, "--json")
    assert verified.code == 0
    found = [check for check in verified.json["checks"] if check["check"] == "signature"]
    assert [check["subject"] for check in found] == [MODEL_SIGNATURE, ENVELOPE]


def test_verify_refuses_a_bundle_of_somebody_else_before_it_runs_it(
    finished_bundle: Bundle,
    keys: Keys,
    others: Keys,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    archive = tmp_path / "nano.zip"
    assert (
        run(capsys, "package", finished_bundle.path, "--sign", keys.private, "-o", archive).code
        == 0
    )
    for path, problem in (
        (finished_bundle.path, "is missing: the bundle is not signed"),
        (archive, "Key mismatch"),
    ):
        refused = run(capsys, "verify", path, "--key", others.public, "--json")
        assert refused.code == 1
        failed = [check for check in refused.json["checks"] if not check["passed"]]
        assert failed[0]["subject"] == MODEL_SIGNATURE
        assert problem in failed[0]["note"]
        kinds = {check["check"] for check in refused.json["checks"]}
        assert kinds == {"files", "signature"}


def test_a_key_that_cannot_be_used_is_refused_before_any_work(
    finished_bundle: Bundle, keys: Keys, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("no key")
    for key in (tmp_path / "missing", tmp_path / "text", keys.public):
        out = tmp_path / "out"
        refused = run(capsys, "package", finished_bundle.path, "--sign", key, "-o", out)
        assert refused.code == 2
        assert key.name in refused.err
        assert not out.exists()
    for key in (tmp_path / "missing", tmp_path / "text", keys.private):
        refused = run(capsys, "verify", finished_bundle.path, "--key", key)
        assert refused.code == 2
        assert key.name in refused.err


def test_the_name_in_a_signature_is_that_of_the_bundle(
    finished_bundle: Bundle, keys: Keys, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = tmp_path / "nano.zip"
    run(capsys, "package", finished_bundle.path, "--sign", keys.private, "-o", archive)
    with zipfile.ZipFile(archive) as file:
        bundle = json.loads(file.read(MODEL_SIGNATURE))
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    assert statement["subject"][0]["name"] == "nano"


# Keys that cannot be used, and missing libraries.


def test_keys_that_cannot_be_used_are_refused_with_a_remedy(
    signed: Path, keys: Keys, tmp_path: Path
) -> None:
    p256, old = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256K1())
    locked = write_keys(tmp_path / "locked", p256, BestAvailableEncryption(b"secret"))
    long = write_keys(tmp_path / "rsa", rsa.generate_private_key(65537, 2048))
    curve = write_keys(tmp_path / "curve", old)
    (tmp_path / "text").write_text("no key")
    before = (signed / MODEL_SIGNATURE).read_bytes()
    for path, problem in (
        (locked.private, "is a private key with a passphrase"),
        (long.private, "is not a key of secp256r1"),
        (curve.private, "is not a key of secp256r1"),
        (keys.public, "is not a private key in PEM"),
        (tmp_path / "text", "is not a private key in PEM"),
        (tmp_path / "missing", "cannot be opened"),
        (tmp_path, "is a folder"),
    ):
        with pytest.raises(InputError, match=problem) as raised:
            sign(signed, path)
        assert raised.value.remedy
    for path, problem in (
        (keys.private, "is a private key"),
        (long.public, "is not a key of secp256r1"),
        (curve.public, "is not a key of secp256r1"),
        (tmp_path / "text", "is not a public key in PEM"),
        (tmp_path / "missing", "cannot be opened"),
        (Path("/dev/zero"), "is a device"),
    ):
        with pytest.raises(InputError, match=problem) as raised:
            key_findings(signed, path)
        assert raised.value.remedy
    assert (signed / MODEL_SIGNATURE).read_bytes() == before


def test_a_folder_with_a_link_is_not_signed(unsigned: Path, keys: Keys) -> None:
    link(unsigned)
    with pytest.raises(InputError, match=r"model\.onnx: is a link"):
        sign(unsigned, keys.private)
    assert not (unsigned / MODEL_SIGNATURE).exists()


@pytest.mark.parametrize("library", ["model_signing", "OpenSSL", "securesystemslib"])
def test_a_missing_library_names_the_extra(
    library: str, signed: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    for use in (sign, key_findings):
        with pytest.raises(MissingExtraError, match=r"pip install 'mobilellm-exporter\[sign\]'"):
            use(signed, keys.private)


def test_keyless_signing_without_the_network_says_so(
    signed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(InputError, match="Check the network"):
        identity_findings(signed, "a@example.org", "https://accounts.example.org")
    with pytest.raises(InputError, match="Check the network"):
        sign_keyless(signed, "token")
