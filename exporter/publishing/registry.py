"""Publish a bundle to an OCI registry with the ORAS client, one layer for each file.

    mobilellm publish nano.tar.zst --to oci://localhost:5000/nano:1 --yes
    oras pull localhost:5000/nano:1 -o nano

A login is that of ``docker login`` or ``oras login``. Registries on this machine are spoken to in
plain HTTP, all others in HTTPS.
"""

import hashlib
import inspect
import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from exporter.bundle.bundle import CHECKSUMS
from exporter.bundle.markdown import plain
from exporter.bundle.origin import is_hub_id
from exporter.errors import InputError, MissingExtraError, short
from exporter.model.licence import LICENCE_FILES
from exporter.progress import Progress
from exporter.publishing.contents import Contents
from exporter.publishing.network import network_errors

ARTIFACT_TYPE = "application/vnd.mobilellm-exporter.bundle.v2"
TITLE = "org.opencontainers.image.title"
#: The empty configuration that the OCI specification names for artifacts.
_EMPTY = b"{}"
_EMPTY_TYPE = "application/vnd.oci.empty.v1+json"
_MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
_MEDIA_TYPES = {
    "provenance.json": "application/vnd.in-toto+json",
    "provenance.dsse.json": "application/vnd.dsse.envelope.v1+json",
    "mlbom.cdx.json": "application/vnd.cyclonedx+json",
    "model.sig": "application/vnd.dev.sigstore.bundle.v0.3+json",
    **dict.fromkeys((CHECKSUMS, *LICENCE_FILES), "text/plain"),
    ".json": "application/json",
    ".md": "text/markdown",
    ".txt": "text/plain",
}
#: A larger file is uploaded in pieces of 16 MiB; a smaller one is held in memory.
_CHUNKED_BYTES = 64 << 20
#: Seconds to connect to a registry, and to wait for an answer.
_TIMEOUTS = (10, 600)
#: The characters that the OCI specification of distribution allows.
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REFERENCE = re.compile(
    r"//(?P<host>[A-Za-z0-9.-]+(?::\d{1,5})?)"
    rf"/(?P<name>{_PART}(?:/{_PART})*):(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{{0,127}})"
)
_LOGIN = "docker login or oras login"
_LOOPBACK = re.compile(r"(localhost|127(\.\d{1,3}){3})(:\d+)?")


@dataclass(frozen=True)
class Reference:
    """A name and a tag in a registry."""

    host: str
    name: str
    tag: str

    def __str__(self) -> str:
        return f"{self.host}/{self.name}:{self.tag}"


def parse_reference(text: str, destination: str) -> Reference:
    """The reference in ``//HOST:PORT/NAME:TAG``. Raises InputError, also without the client."""
    found = _REFERENCE.fullmatch(text)
    if not found or not re.search("[.:]", found["host"]):
        raise InputError(
            destination,
            "is not the name of an artifact in a registry",
            "Write oci://HOST:PORT/NAME:TAG, with a name in small letters",
        )
    if find_spec("oras") is None:
        raise MissingExtraError("oras", "publish")
    return Reference(found["host"], found["name"], found["tag"])


def write(reference: Reference, contents: Contents, overwrite: bool, progress: Progress) -> str:
    """Push the bundle. Returns ``HOST/NAME@DIGEST``.

    The same bundle has the same digest. Raises InputError for a tag that has other contents, unless
    `overwrite`, and for what the registry refuses.
    """
    with network_errors(reference, _LOGIN):
        client, container = _client(reference)
        manifest = artifact_manifest(contents)
        found = _current(client, container)
        if found is not None and found != manifest and not overwrite:
            raise InputError(
                reference, "has other contents", "Give another tag, or replace it with --overwrite"
            )
        layers = manifest["layers"]
        for done, layer in enumerate(layers):
            name = layer["annotations"][TITLE]
            progress("publish", done, len(layers), name)
            _upload(client, container, contents.folder / name, layer)
        with tempfile.NamedTemporaryFile(prefix="mobilellm-") as empty:
            empty.write(_EMPTY)
            empty.flush()
            _upload(client, container, Path(empty.name), manifest["config"])
        _check(client.upload_manifest(manifest, container), "the manifest")
        progress("publish", len(layers), len(layers))
        if _current(client, container) != manifest:
            raise ValueError("the registry holds another manifest than the one that was uploaded")
    digest = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    return f"{reference.host}/{reference.name}@sha256:{digest}"


def artifact_manifest(contents: Contents) -> dict[str, Any]:
    """The OCI image manifest of a bundle: a layer for each file, with its name as title."""
    sizes = contents.sizes
    return {
        "schemaVersion": 2,
        "mediaType": _MANIFEST_TYPE,
        "artifactType": ARTIFACT_TYPE,
        "config": _descriptor(_EMPTY_TYPE, hashlib.sha256(_EMPTY).hexdigest(), len(_EMPTY)),
        "layers": [
            {**_descriptor(_media_type(name), digest, sizes[name]), "annotations": {TITLE: name}}
            for name, digest in contents.hashes.items()
        ],
        "annotations": _annotations(contents),
    }


def _descriptor(media_type: str, digest: str, size: int) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": size}


def _media_type(name: str) -> str:
    path = Path(name)
    known = _MEDIA_TYPES.get(path.name) or _MEDIA_TYPES.get(path.suffix)
    return known or "application/octet-stream"


def _annotations(contents: Contents) -> dict[str, str]:
    """What the bundle is and what it was made from. No time: the same bundle has one digest."""
    manifest, licence = contents.manifest, contents.licence
    model = manifest.recipe.get("model")
    name = re.sub("[^A-Za-z0-9.-]", "-", licence.name or licence.id)
    spdx = licence.spdx() or f"LicenseRef-{name}"
    found = {
        TITLE: plain(manifest.recipe.get("name", "")),
        "org.opencontainers.image.licenses": spdx,
        "mobilellm.base_model": str(model) if is_hub_id(model) else "",
        "mobilellm.targets": ",".join(manifest.targets),
        "mobilellm.version": manifest.versions.get("mobilellm-exporter", ""),
        **{f"mobilellm.source.{name}": digest for name, digest in manifest.source.items()},
    }
    return {key: value for key, value in found.items() if value}


def _client(reference: Reference) -> tuple[Any, Any]:
    """The client and the name of the artifact, with the login of the client's own store."""
    import requests
    from oras import container, logger, provider

    logger.setup_logger(quiet=True)
    local = bool(_LOOPBACK.fullmatch(reference.host))
    address = f"http{'' if local else 's'}://{reference.host}/v2/"
    asked = requests.get(address, timeout=_TIMEOUTS).headers.get("WWW-Authenticate", "")
    # The client must be told: for tokens, it takes the realm of a password for an address.
    login = "basic" if asked.lower().startswith("basic") else "token"
    client = provider.Registry(hostname=reference.host, insecure=local, auth_backend=login)
    client.session.request = partial(client.session.request, timeout=_TIMEOUTS)
    artifact = container.Container(str(reference))
    client.auth.load_configs(artifact)
    if login == "basic" and getattr(client.auth, "_basic_auth", None) is None:
        raise InputError(reference.host, "wants a name and a password", f"Run: {_LOGIN}")
    return client, artifact


def _current(client: Any, container: Any) -> object:
    """The manifest that the registry has for this tag, or None.

    The client repeats a request that fails for two minutes. A registry that cannot be reached, or
    that refuses the login, should be reported at once, so this one is not repeated.
    """
    request = inspect.unwrap(type(client).do_request)
    url = f"{client.prefix}://{container.manifest_url()}"
    response = request(client, url, "GET", headers={"Accept": _MANIFEST_TYPE})
    if response.status_code == 404:
        return None
    _check(response, "the tag")
    found: object = response.json()
    return found


def _upload(client: Any, container: Any, path: Path, layer: Mapping[str, Any]) -> None:
    in_pieces = layer["size"] > _CHUNKED_BYTES
    _check(client.upload_blob(str(path), container, layer, do_chunked=in_pieces), path.name)


def _check(response: Any, what: str) -> None:
    if response.status_code not in (200, 201, 202):
        reason = short(response.text) if response.text else response.reason
        raise ValueError(f"{what}: status {response.status_code}, {reason}")
