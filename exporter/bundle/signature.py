"""Sign a bundle, and check who signed it, by OpenSSF model signing.

    mobilellm package build/nano --sign key.pem -o nano.tar.zst
    mobilellm verify nano.tar.zst --key key.pub

``model.sig`` is a Sigstore bundle: one signature over the SHA-256 of every other file. It is made
and read by the package ``model-signing``, whose command checks it too, without this tool.
``provenance.dsse.json`` is ``provenance.json`` in a signed envelope (DSSE), for tools that take
in-toto attestations. A key is an elliptic one: P-256, P-384 or P-521.
"""

import base64
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.bundle.bundle import SIGNATURES, tree
from exporter.bundle.provenance import PROVENANCE
from exporter.errors import InputError, MissingExtraError, short
from exporter.files import copy_file, differing_files, json_bytes, replacing
from exporter.foreign import JSON_BYTES, inside, parse_json, read_bytes, read_json

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import (
        EllipticCurvePrivateKey,
        EllipticCurvePublicKey,
    )
    from model_signing import hashing, signing, verifying

MODEL_SIGNATURE, ENVELOPE = SIGNATURES
#: The type of the payload of an envelope with an in-toto Statement.
PAYLOAD_TYPE = "application/vnd.in-toto+json"
#: The largest file of a key, in bytes.
_KEY_BYTES = 1 << 16
_CURVES = ("secp256r1", "secp384r1", "secp521r1")
_NEW_KEY = "Make one: openssl ecparam -name prime256v1 -genkey -noout -out key.pem"
_PUBLIC_KEY = "Get the public key: openssl ec -in key.pem -pubout -out key.pub"


@dataclass(frozen=True)
class Signer:
    """Who must have signed a bundle: the owner of a public key in PEM, or an `identity` that an
    `issuer` has confirmed."""

    public_key: Path | None = None
    identity: str = ""
    issuer: str = ""

    def findings(self, folder: Path) -> dict[str, str]:
        """`key_findings` or `identity_findings`."""
        if self.public_key is not None:
            return key_findings(folder, self.public_key)
        return identity_findings(folder, self.identity, self.issuer)


def check_can_sign(private_key: Path | None) -> None:
    """Raise the InputError that `sign` would raise for this key, or `sign_keyless` without one,
    before any work."""
    _require_libraries()
    if private_key is not None:
        _private_key(private_key)


def sign(folder: Path, private_key: Path) -> None:
    """Sign all files of a bundle with a private key in PEM that has no passphrase.

    Writes ``provenance.dsse.json``, then ``model.sig``, which covers the former too; signatures
    that are there are replaced. Raises InputError.
    """
    _require_libraries()
    from model_signing import signing

    key = _private_key(private_key)
    _check_signable(folder)
    with replacing(folder / ENVELOPE) as file:
        file.write(_envelope(read_bytes(folder / PROVENANCE, JSON_BYTES), key))
    _write_signature(folder, signing.Config().use_elliptic_key_signer(private_key=private_key))


def sign_keyless(folder: Path, identity_token: str | None = None) -> None:
    """Sign all files of a bundle with the identity of a person or of a CI job, through Sigstore.

    The identity is that of the token, or of the CI job, or of who logs in with a browser. The
    signature is in ``model.sig`` alone. It needs the network, and was not tried in the tests of
    this project. Raises InputError.
    """
    _require_libraries()
    from model_signing import signing

    _check_signable(folder)
    with _online():
        config = signing.Config().use_sigstore_signer(
            identity_token=identity_token, use_ambient_credentials=True
        )
        (folder / ENVELOPE).unlink(missing_ok=True)
        _write_signature(folder, config)


def key_findings(folder: Path, public_key: Path) -> dict[str, str]:
    """Whether the owner of the key signed exactly the files of this bundle: name of each signature,
    and of each file that contradicts it → what is wrong, empty if nothing is.

    Raises InputError for a key that cannot be used.
    """
    _require_libraries()
    from model_signing import verifying

    key = _public_key(public_key)
    config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    findings = _findings(folder, config, "publicKey")
    if (folder / ENVELOPE).exists() and ENVELOPE not in findings:
        findings[ENVELOPE] = _envelope_problem(folder, key)
    return findings


def identity_findings(folder: Path, identity: str, issuer: str) -> dict[str, str]:
    """`key_findings` for a keyless signature of this identity, such as an e-mail address or the
    address of a workflow, which this issuer has confirmed.

    It needs the network, and was not tried in the tests of this project.
    """
    _require_libraries()
    from model_signing import verifying

    with _online():
        config = verifying.Config().use_sigstore_verifier(identity=identity, oidc_issuer=issuer)
    return _findings(folder, config, "certificate")


def _require_libraries() -> None:
    for library in ("model_signing", "OpenSSL", "securesystemslib"):
        if find_spec(library) is None:
            raise MissingExtraError(library, "sign")


@contextmanager
def _online() -> Iterator[None]:
    """Requests to Sigstore."""
    try:
        yield
    except Exception as error:  # requests, TUF and OpenID each have errors of their own
        raise InputError(
            "Sigstore",
            f"cannot be used ({_reason(error)})",
            "Check the network and the identity token, or use a key",
        ) from error


def _private_key(path: Path) -> "EllipticCurvePrivateKey":
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(read_bytes(path, _KEY_BYTES), None)
    except TypeError as error:
        remedy = "Write it without one: openssl ec -in key.pem -out plain.pem"
        raise InputError(path, "is a private key with a passphrase", remedy) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InputError(path, "is not a private key in PEM", _NEW_KEY) from error
    if not isinstance(key, EllipticCurvePrivateKey) or key.curve.name not in _CURVES:
        raise InputError(path, f"is not a key of {', '.join(_CURVES)}", _NEW_KEY)
    return key


def _public_key(path: Path) -> "EllipticCurvePublicKey":
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    content = read_bytes(path, _KEY_BYTES)
    if b"PRIVATE KEY" in content:
        raise InputError(path, "is a private key", _PUBLIC_KEY)
    try:
        key = load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InputError(path, "is not a public key in PEM", _PUBLIC_KEY) from error
    if not isinstance(key, EllipticCurvePublicKey) or key.curve.name not in _CURVES:
        raise InputError(path, f"is not a key of {', '.join(_CURVES)}", _PUBLIC_KEY)
    return key


def _check_signable(folder: Path) -> None:
    _, foreign = tree(folder)
    for name, problem in foreign.items():
        raise InputError(folder / name, problem, "Export the bundle again")


def _write_signature(folder: Path, config: "signing.Config") -> None:
    (folder / MODEL_SIGNATURE).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="mobilellm-") as scratch:
        written = Path(scratch) / MODEL_SIGNATURE
        config.set_hashing_config(_hashing()).sign(folder.resolve(), written)
        copy_file(written, folder / MODEL_SIGNATURE)


def _hashing() -> "hashing.Config":
    """Every file but the signature; the library would leave out files of git too."""
    from model_signing import hashing

    return hashing.Config().set_ignored_paths(paths=[MODEL_SIGNATURE], ignore_git_paths=False)


def _findings(folder: Path, config: "verifying.Config", material: str) -> dict[str, str]:
    """What is wrong with ``model.sig`` and with the files that it covers; `material` is the kind of
    signer that it must name."""
    _, foreign = tree(folder)
    if foreign:
        return {MODEL_SIGNATURE: f"is not checked: {next(iter(foreign))} is in the way", **foreign}
    if not (folder / MODEL_SIGNATURE).exists():
        return {MODEL_SIGNATURE: "is missing: the bundle is not signed"}
    try:
        content = read_bytes(folder / MODEL_SIGNATURE, JSON_BYTES)
        covered = _covered(content, material)
    except InputError as error:
        return {MODEL_SIGNATURE: error.problem}
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    others = sorted(files - covered.keys() - {MODEL_SIGNATURE})
    wrong = _verification_problem(folder, content, config)
    if not wrong and others:
        wrong = f"covers {len(covered)} files, not {', '.join(others)}"
    return {
        MODEL_SIGNATURE: wrong,
        **dict.fromkeys(others, f"is not covered by {MODEL_SIGNATURE}"),
        **(differing_files(folder, covered) if wrong else {}),
    }


def _covered(content: bytes, material: str) -> dict[str, str]:
    """The files that a signature says it covers: name → SHA-256. Raises InputError.

    The text of a signature can leave files out (``ignore_paths``), and the library then leaves
    them out too. So the caller compares this list with the files of the folder.
    """
    try:
        bundle = parse_json(content, MODEL_SIGNATURE)
        if bundle["verificationMaterial"].get(material) is None:
            wanted = "with a key" if material == "publicKey" else "by an identity"
            raise InputError(MODEL_SIGNATURE, f"was not signed {wanted}")
        envelope = bundle["dsseEnvelope"]
        for signature in envelope["signatures"]:
            _decoded(signature["sig"])
        statement = parse_json(_decoded(envelope["payload"]), MODEL_SIGNATURE)
        resources = statement["predicate"]["resources"]
        return {str(resource["name"]): str(resource["digest"]) for resource in resources}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        problem = f"is not a signature of a model ({_reason(error)})"
        raise InputError(MODEL_SIGNATURE, problem) from error


def _decoded(text: str) -> bytes:
    """Decode base64. Raises ValueError unless it is the one text for these bytes: the last
    character may have bits that are not used."""
    content = base64.b64decode(text, validate=True)
    if base64.b64encode(content).decode() != text:
        raise ValueError("base64 with bits that are not used")
    return content


def _verification_problem(folder: Path, content: bytes, config: "verifying.Config") -> str:
    """What the library finds wrong; empty if the signature is valid for the files that it covers.

    `content` is what was read of ``model.sig``; the library reads a copy of it.
    """
    with tempfile.TemporaryDirectory(prefix="mobilellm-") as scratch:
        copy = Path(scratch) / MODEL_SIGNATURE
        copy.write_bytes(content)
        try:
            with redirect_stdout(sys.stderr):  # the library prints its warnings
                config.set_hashing_config(_hashing()).verify(folder.resolve(), copy)
        except Exception as error:  # a foreign parser may raise anything for a malformed file
            return f"is not valid for this bundle ({_reason(error)})"
    return ""


def _envelope(payload: bytes, key: "EllipticCurvePrivateKey") -> bytes:
    """The content of ``provenance.dsse.json``."""
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import CryptoSigner

    envelope = Envelope(payload, PAYLOAD_TYPE, {})
    envelope.sign(CryptoSigner(key))
    return json_bytes(envelope.to_dict())


def _envelope_problem(folder: Path, key: "EllipticCurvePublicKey") -> str:
    """What is wrong with ``provenance.dsse.json``; empty if the key signed ``provenance.json``."""
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import Key, SSlibKey

    try:
        content: Mapping[str, Any] = read_json(inside(folder, ENVELOPE, links=False))
        provenance = read_bytes(inside(folder, PROVENANCE, links=False), JSON_BYTES)
    except InputError as error:
        return error.problem
    try:
        envelope = Envelope.from_dict(dict(content))
        # An id of a key is a hint that nothing protects: only the signature counts.
        keys: list[Key] = [SSlibKey.from_crypto(key, keyid) for keyid in envelope.signatures]
        envelope.verify(keys, 1)
    except Exception as error:  # a foreign parser may raise anything for a malformed file
        return f"has no valid signature of this key ({_reason(error)})"
    if envelope.payload_type != PAYLOAD_TYPE:
        return f"holds {short(envelope.payload_type)}, not {PAYLOAD_TYPE}"
    return "" if envelope.payload == provenance else f"holds another text than {PROVENANCE}"


def _reason(error: Exception) -> str:
    """The text of an error of a library, on one line."""
    lines = str(error).split()
    return short(" ".join(lines))[1:-1] if lines else type(error).__name__
