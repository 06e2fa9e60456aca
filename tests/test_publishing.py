"""Publishing: to a folder, to a real registry on this machine, and to a stand-in of the hub."""

import base64
import hashlib
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import oras.client
import pytest
import requests
from calibrating import small_checkpoint
from commands import contents, flip, run
from conftest import write_checkpoint
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from gating import evaluation
from hub import TOKEN, Hub, running_hub

from exporter import packaging
from exporter.bundle.bundle import Bundle
from exporter.bundle.manifest import read_manifest
from exporter.errors import InputError
from exporter.pipeline import no_progress
from exporter.publishing import registry as registries
from exporter.publishing.publish import publish

Capture = pytest.CaptureFixture[str]
REGISTRY = shutil.which("docker-registry")
#: The password ``secret`` of the user ``me``, as a registry stores it (bcrypt).
PASSWORD = "me:$2b$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a"
NOBODY = "127.0.0.1:9"


@pytest.fixture(scope="module")
def other(finished_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo bundle with a measurement and a signature: another bundle."""
    folder = tmp_path_factory.mktemp("other")
    score = evaluation(read_manifest(finished_bundle.path))
    (folder / "quality.json").write_text(json.dumps(score))
    key = ec.generate_private_key(ec.SECP256R1())
    form = (Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "key.pem").write_bytes(key.private_bytes(*form))
    request = packaging.Request([folder / "quality.json"], folder / "key.pem")
    packaging.package(finished_bundle.path, folder / "bundle", request, no_progress)
    return folder / "bundle"


@pytest.fixture
def bundle(finished_bundle: Bundle) -> Path:
    return finished_bundle.path


def refusal(path: Path, destination: str, *parts: str, **options: Any) -> None:
    with pytest.raises(InputError) as raised:
        publish(path, destination, True, no_progress, **options)
    missing = [part for part in parts if part not in str(raised.value)]
    assert not missing, f"{missing} not in: {raised.value}"
    assert raised.value.remedy


# What is published, and what not.


@pytest.mark.parametrize("kind", ["folder", "oci", "hub"])
def test_without_yes_nothing_is_written_and_everything_is_listed(
    kind: str, bundle: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://{NOBODY}")
    to = {"folder": str(tmp_path / "out"), "oci": f"oci://{NOBODY}/nano:1", "hub": "hub:me/nano"}
    shown = run(capsys, "publish", bundle, "--to", to[kind], "--json").json
    files = {name: path.stat().st_size for name, path in files_of(bundle).items()}
    assert shown["files"] == files
    assert shown["bytes"] == sum(files.values())
    assert (shown["published"], shown["licence"]) == (False, "bsd-3-clause")
    assert shown["destination"] == to[kind]
    assert list(tmp_path.iterdir()) == []
    text = run(capsys, "publish", bundle, "--to", to[kind])
    assert text.code == 0
    assert "this was a dry run; --yes publishes it" in text.out


def files_of(folder: Path) -> dict[str, Path]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path for path in paths}


@pytest.mark.parametrize("yes", [(), ("--yes",)])
def test_a_damaged_bundle_is_not_published(
    yes: tuple[str, ...], bundle_copy: Path, tmp_path: Path, capsys: Capture
) -> None:
    flip(bundle_copy / "onnx" / "onnx" / "model_q4.onnx", 1000)
    refused = run(capsys, "publish", bundle_copy, "--to", tmp_path / "out", *yes)
    assert refused.code == 2
    assert "onnx/onnx/model_q4.onnx: has sha256" in refused.err
    assert not (tmp_path / "out").exists()


def test_a_file_that_does_not_belong_to_the_bundle_is_not_published(
    bundle_copy: Path, tmp_path: Path
) -> None:
    (bundle_copy / "token.txt").write_text("secret")
    refusal(bundle_copy, str(tmp_path / "out"), "token.txt", "not listed")
    assert not (tmp_path / "out").exists()


def test_a_bundle_without_a_known_licence_is_not_published_until_the_recipe_names_one(
    tmp_path: Path, capsys: Capture
) -> None:
    def write(config: dict[str, Any], name: str, weights: dict[str, Any]) -> Path:
        return write_checkpoint(tmp_path / name, config, weights)

    source = small_checkpoint(write, name="source").path
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("targets:\n  - target: onnx\nmax_context: 128\n")
    for terms, out in (("null", "unknown"), ("{id: mit}", "known")):
        command = ("export", recipe, f"license={terms}", "--checkpoint", source)
        assert run(capsys, *command, "-o", tmp_path / out).code == 0
    refusal(
        tmp_path / "unknown", str(tmp_path / "out"), "no known licence", "license.id=apache-2.0"
    )
    assert publish(tmp_path / "known", "hub:me/x", False, no_progress).licence == "mit"


@pytest.mark.parametrize(
    "destination",
    [
        "s3://bucket/nano", "oci:", "oci://", "oci://nano:1", "oci://localhost/nano:1",
        "oci://a.b/nano", "oci://a.b/Nano:1", "oci://a.b/nano:", "oci://a.b/nano:1/2",
        "oci://a.b/../nano:1", "oci://me:secret@a.b/nano:1", "oci://a.b/nano:1@sha256:00",
        "hub:", "hub:nano", "hub:a/b/c", "hub:../b", "hub:a/b?c", "hub:a b/c",
    ],
)  # fmt: skip
def test_what_names_no_destination_is_refused_before_any_work(
    destination: str, tmp_path: Path
) -> None:
    refusal(tmp_path / "no bundle", destination, destination)


def test_without_the_client_of_registries_its_extra_is_named(bundle: Path) -> None:
    program = (
        "import sys; sys.modules['oras'] = None; from exporter.cli import main; "
        f"main(['publish', {str(bundle)!r}, '--to', 'oci://{NOBODY}/nano:1'])"
    )
    command = [sys.executable, "-c", program]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    assert outcome.returncode == 2
    assert "pip install 'mobilellm-exporter[publish]'" in outcome.stderr


# A folder.


def test_a_folder_gets_the_bundle_byte_for_byte_from_a_folder_and_from_an_archive(
    bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    archive = tmp_path / "nano.zip"
    assert run(capsys, "package", bundle, "-o", archive).code == 0
    for source, out in ((bundle, tmp_path / "one"), (archive, tmp_path / "far" / "two")):
        shown = run(capsys, "publish", source, "--to", out, "--yes", "--json").json
        assert (shown["published"], shown["reference"]) == (True, str(out))
        assert contents(out) == contents(bundle)


def test_the_same_bundle_again_changes_nothing_and_another_needs_overwrite(
    bundle: Path, other: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    publish(bundle, str(out), True, no_progress)
    before = out.stat().st_mtime_ns
    publish(bundle, str(out), True, no_progress)
    assert out.stat().st_mtime_ns == before
    refusal(other, str(out), "holds another bundle", "--overwrite")
    assert contents(out) == contents(bundle)
    publish(other, str(out), True, no_progress, overwrite=True)
    assert contents(out) == contents(other)


def test_what_is_no_bundle_is_never_replaced(bundle: Path, tmp_path: Path) -> None:
    full, file, link = (tmp_path / name for name in ("full", "file", "link"))
    full.mkdir()
    (full / "thesis.txt").write_text("mine")
    file.write_text("mine")
    link.symlink_to(full)
    for out, problem in (
        (full, "holds other files"), (file, "is not a folder"), (link, "is not a folder"),
        (bundle, "holds the model that is read"), (bundle.parent, "holds the model that is read"),
        (bundle / "copy", "lies inside the bundle"), (Path("/"), ""), (Path(), "has no name"),
    ):  # fmt: skip
        refusal(bundle, str(out), problem, overwrite=True)
    assert (full / "thesis.txt").read_text() == file.read_text() == "mine"


def test_a_copy_that_fails_on_the_way_leaves_what_was_there(
    bundle: Path, other: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    publish(bundle, str(out), True, no_progress)

    def killed(stage: str, done: int, total: int, note: str = "") -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish(other, str(out), True, killed, overwrite=True)
    assert contents(out) == contents(bundle)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# A registry.


@dataclass(frozen=True)
class Registry:
    """A running registry."""

    host: str

    def manifest(self, name: str) -> requests.Response:
        kind = "application/vnd.oci.image.manifest.v1+json"
        path, tag = name.split(":")
        address = f"http://{self.host}/v2/{path}/manifests/{tag}"
        return requests.get(address, headers={"Accept": kind}, timeout=10)

    def pulled(self, name: str, out: Path) -> Path:
        """The files of an artifact as the client pulls them."""
        oras.client.OrasClient(insecure=True).pull(f"{self.host}/{name}", outdir=str(out))
        return out


def started_registry(folder: Path, password: str = "") -> Iterator[Registry]:
    """Start a registry of this machine's own, with its data in `folder`."""
    if REGISTRY is None:
        pytest.skip("docker-registry is not installed (tests/tools.sh installs it)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{free.getsockname()[1]}"
    config: dict[str, Any] = {
        "version": 0.1,
        "log": {"level": "error", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(folder / "data")}},
        "http": {"addr": host},
    }
    if password:
        (folder / "passwords").write_text(f"{password}\n")
        config["auth"] = {"htpasswd": {"realm": "test", "path": str(folder / "passwords")}}
    (folder / "config.yml").write_text(json.dumps(config))
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [REGISTRY, "serve", str(folder / "config.yml")], stdout=log, stderr=log
        )
        try:
            for _ in range(100):
                try:
                    requests.get(f"http://{host}/v2/", timeout=1)
                    break
                except requests.ConnectionError:
                    time.sleep(0.05)
            yield Registry(host)
        finally:
            process.terminate()
            process.wait()


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    yield from started_registry(tmp_path_factory.mktemp("registry"))


@pytest.fixture
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry that wants a password."""
    yield from started_registry(tmp_path_factory.mktemp("locked"), PASSWORD)


def test_a_registry_gives_the_bundle_back_byte_for_byte(
    registry: Registry, bundle: Path, tmp_path: Path
) -> None:
    done = publish(bundle, f"oci://{registry.host}/models/nano:1", True, no_progress)
    assert contents(registry.pulled("models/nano:1", tmp_path / "out")) == contents(bundle)
    answer = registry.manifest("models/nano:1")
    digest = answer.headers["Docker-Content-Digest"]
    assert done.reference == f"{registry.host}/models/nano@{digest}"
    manifest = answer.json()
    assert manifest["artifactType"] == registries.ARTIFACT_TYPE
    assert manifest["annotations"]["org.opencontainers.image.licenses"] == "BSD-3-Clause"
    assert manifest["annotations"]["mobilellm.targets"] == "executorch,onnx,coreml"
    source = manifest["annotations"]["mobilellm.source.model.safetensors"]
    assert source == read_manifest(bundle).source["model.safetensors"]
    kinds = {one["annotations"][registries.TITLE]: one["mediaType"] for one in manifest["layers"]}
    assert kinds["README.md"] == "text/markdown"
    assert kinds["LICENSE"] == "text/plain"
    assert kinds["onnx/genai_config.json"] == "application/json"
    assert kinds["executorch/model.pte"] == "application/octet-stream"


def test_a_large_file_is_uploaded_in_pieces(
    registry: Registry, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registries, "_CHUNKED_BYTES", 100_000)
    publish(bundle, f"oci://{registry.host}/pieces:1", True, no_progress)
    assert contents(registry.pulled("pieces:1", tmp_path / "out")) == contents(bundle)


def test_the_same_bundle_has_one_digest_and_a_tag_is_not_moved_unasked(
    registry: Registry, bundle: Path, other: Path
) -> None:
    to = f"oci://{registry.host}/tags:1"
    first = publish(bundle, to, True, no_progress).reference
    assert publish(bundle, to, True, no_progress).reference == first
    refusal(other, to, "has other contents", "--overwrite")
    assert registry.manifest("tags:1").headers["Docker-Content-Digest"] == first.split("@")[1]
    moved = publish(other, to, True, no_progress, overwrite=True).reference
    assert registry.manifest("tags:1").headers["Docker-Content-Digest"] == moved.split("@")[1]
    assert moved != first
    layers = registry.manifest("tags:1").json()["layers"]
    kinds = {one["annotations"][registries.TITLE]: one["mediaType"] for one in layers}
    assert kinds["model.sig"] == "application/vnd.dev.sigstore.bundle.v0.3+json"


def test_a_registry_that_does_not_answer_is_reported_at_once(bundle: Path) -> None:
    started = time.monotonic()
    refusal(bundle, f"oci://{NOBODY}/nano:1", NOBODY, "was not published", "docker login")
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("login", "problem"),
    [("me:secret", ""), ("me:wrong", "status 401"), ("", "wants a name and a password")],
)
def test_a_login_comes_from_the_clients_own_store(
    login: str, problem: str, locked: Registry, bundle: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    store = tmp_path / "home" / ".docker" / "config.json"
    store.parent.mkdir(parents=True)
    stored = {"auths": {locked.host: {"auth": base64.b64encode(login.encode()).decode()}}}
    store.write_text(json.dumps(stored if login else {}))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    to = f"oci://{locked.host}/nano:1"
    if problem:
        refusal(bundle, to, problem)
    else:
        assert publish(bundle, to, True, no_progress).reference


# The hub.


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with running_hub() as found:
        for name, value in (
            ("ENDPOINT", found.url),
            ("HUGGINGFACE_CO_URL_TEMPLATE", found.url + "/{repo_id}/resolve/{revision}/{filename}"),
            ("HF_HUB_DISABLE_XET", True), ("HF_TOKEN_PATH", str(tmp_path / "token")),
        ):  # fmt: skip
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


def test_the_hub_gets_the_bundle_in_one_commit_and_gives_it_back(
    hub: Hub, bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    shown = run(capsys, "publish", bundle, "--to", "hub:me/nano", "--yes", "--json").json
    assert shown["reference"] == f"{hub.url}/me/nano/commit/1"
    assert len(hub.commits) == 1
    large = {"executorch/model.pte", "quantized/quantized.safetensors"}
    keys = {line["value"].get("path"): line["key"] for line in hub.commits[0]}
    assert {keys[name] for name in large} == {"lfsFile"}
    assert keys["README.md"] == "file"
    got = huggingface_hub.snapshot_download("me/nano", local_dir=tmp_path / "out")
    shutil.rmtree(Path(got) / ".cache")
    (Path(got) / ".gitattributes").unlink()
    assert contents(Path(got)) == contents(bundle)


def test_the_same_bundle_again_is_no_commit_and_another_replaces_all_files(
    hub: Hub, bundle: Path, other: Path
) -> None:
    publish(other, "hub:me/nano", True, no_progress)
    publish(other, "hub:me/nano", True, no_progress)
    assert len(hub.commits) == 1
    assert {"results/quality.json", "model.sig"} <= hub.models["me/nano"].keys()
    refusal(bundle, "hub:me/nano", "holds another bundle", "--overwrite")
    publish(bundle, "hub:me/nano", True, no_progress, overwrite=True)
    assert len(hub.commits) == 2
    found = {
        name: hashlib.sha256(content).hexdigest() for name, content in hub.models["me/nano"].items()
    }
    del found[".gitattributes"]
    assert found == {k: v for k, v in contents(bundle).items() if v != "folder"}


def test_a_repository_with_other_files_is_never_written(hub: Hub, bundle: Path) -> None:
    hub.models["me/thesis"] = {".gitattributes": b"", "model.safetensors": b"mine"}
    refusal(bundle, "hub:me/thesis", "other files and no bundle", overwrite=True)
    assert hub.models["me/thesis"]["model.safetensors"] == b"mine"
    assert hub.commits == []


def test_a_file_that_the_repository_ignores_is_reported(hub: Hub, bundle: Path) -> None:
    hub.ignored.add("onnx/onnx/model_q4.onnx_data")
    refusal(bundle, "hub:me/nano", "did not take onnx/onnx/model_q4.onnx_data")


def test_without_a_token_or_an_answer_the_hub_is_reported_with_the_remedy(
    hub: Hub, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = time.monotonic()
    monkeypatch.delenv("HF_TOKEN")
    refusal(bundle, "hub:me/nano", "was not published", "hf auth login")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://{NOBODY}")
    refusal(bundle, "hub:me/nano", "was not published", "Check the address")
    assert hub.commits == []
    assert time.monotonic() - started < 5
