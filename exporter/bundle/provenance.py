"""``provenance.json``: what a bundle was made from, for tools that know in-toto and SLSA.

It is an in-toto Statement v1 (https://in-toto.io/Statement/v1) with a predicate of SLSA provenance
v1 (https://slsa.dev/provenance/v1). It has no time and no path of this machine, so two exports give
the same bytes.

All of it is derived from ``manifest.json``, and `verify` derives it again and compares the bytes.
What `verify` proves of the manifest is therefore proven of the statement:

- `subject`: every file is hashed; the artifacts are lowered again from the quantized checkpoint.
- `externalParameters`: the recipe decides the artifacts and their manifests, which are made again;
  its name, model and profile decide no file.
- `resolvedDependencies`: the checkpoint's files are compared with ``--source``, which quantizes
  them again; texts where they lie at the path in the recipe. A distillation is not run again.
  The versions of packages have to agree in all manifests, and no more.
- That the tool named as builder ran is a claim; a signature says whose.
"""

from collections import Counter
from typing import Any

from exporter.bundle.manifest import BundleManifest
from exporter.bundle.origin import TOOL, calibration_of, hub_model, python_package
from exporter.files import json_bytes

PROVENANCE = "provenance.json"
STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
#: This tool on a machine of the signer: no platform vouches for the build.
BUILDER = python_package(TOOL)
#: docs/packaging.md describes this type: its parameters, and how a build is repeated.
BUILD_TYPE = f"{BUILDER}#export/v1"


def provenance(manifest: BundleManifest) -> bytes:
    """The statement. Its subjects are the models and the quantized checkpoint, not what is added to
    them: documents, licence files and measurements. Raises InputError for a malformed manifest."""
    definition = {
        "buildType": BUILD_TYPE,
        "externalParameters": {"recipe": manifest.recipe},
        "internalParameters": _internal_parameters(manifest),
        "resolvedDependencies": _dependencies(manifest),
    }
    builder = {"id": BUILDER, "version": {TOOL: manifest.versions.get(TOOL, "")}}
    statement = {
        "_type": STATEMENT,
        "subject": [
            _descriptor(name, entry.sha256)
            for name, entry in manifest.files.items()
            if name.split("/")[0] in ("quantized", *manifest.targets)
        ],
        "predicateType": PREDICATE,
        "predicate": {"buildDefinition": definition, "runDetails": {"builder": builder}},
    }
    return json_bytes(statement)


def _internal_parameters(manifest: BundleManifest) -> dict[str, Any]:
    """What decides the integers and is not in the recipe; and how many weights have each scheme."""
    found = calibration_of(manifest).model_dump(
        mode="json", include={"precision", "processes", "wider"}, exclude_unset=True
    )
    schemes = Counter(weight.scheme for weight in manifest.weights.values())
    return {"seeds": manifest.seeds, "calibration": found, "schemes": dict(schemes)}


def _dependencies(manifest: BundleManifest) -> list[dict[str, Any]]:
    """Every file that was read: of the checkpoint, of another teacher, of calibration; and the
    packages that wrote the bundle."""
    calibration = calibration_of(manifest)
    files = [
        _descriptor(f"checkpoint/{name}", digest, hub_model(manifest, name))
        for name, digest in manifest.source.items()
    ]
    files += [_descriptor(f"teacher/{name}", d) for name, d in calibration.teacher.items()]
    files += [_descriptor(f"calibration/{text.source}", text.sha256) for text in calibration.text]
    packages = [
        {"name": name, "uri": python_package(name, version)}
        for name, version in manifest.versions.items()
        if name != TOOL
    ]
    return [*files, *packages]


def _descriptor(name: str, sha256: str, uri: str = "") -> dict[str, Any]:
    """A ResourceDescriptor of in-toto for a file."""
    return {"name": name, **({"uri": uri} if uri else {}), "digest": {"sha256": sha256}}
