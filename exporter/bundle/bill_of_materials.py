"""``mlbom.cdx.json``: the parts of a bundle as a machine-learning bill of materials.

It is CycloneDX 1.6 (https://cyclonedx.org/docs/1.6/json/), for tools that track the licences and
the vulnerabilities of what is delivered. Its root is the model, with a model card and the
checkpoint as its ancestor. Components are every file, every text of the calibration, and every
package that wrote the bundle.

The document is plain data: the library for CycloneDX has no model cards, and another version of it
must not change the bytes that `verify` derives again. The tests validate it with that library.
"""

import json
import math
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from exporter.bundle.manifest import BundleManifest
from exporter.bundle.origin import TOOL, calibration_of, hub_model, python_package
from exporter.bundle.results import EVALUATION, PROFILE, Result
from exporter.errors import InputError
from exporter.files import json_bytes

BILL_OF_MATERIALS = "mlbom.cdx.json"
_MODEL, _CHECKPOINT = "model", "checkpoint"
_WEIGHTS = "quantized/quantized.safetensors"
#: The figures of an evaluation that describe the model.
_QUALITY = ("perplexity", "reference_perplexity", "kl", "top1_agreement", "accuracy")
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, python_package(TOOL))


def bill_of_materials(manifest: BundleManifest, results: Mapping[str, Result]) -> bytes:
    """The document; `results` maps the name of a measurement to its content. Raises InputError for
    a malformed manifest."""
    checkpoint = {"bom-ref": _CHECKPOINT, "scope": "excluded", **_checkpoint(manifest)}
    packages = [_package(*one) for one in manifest.versions.items() if one[0] != TOOL]
    tool = {"type": "application", **_named(TOOL, manifest.versions.get(TOOL, ""))}
    bom = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"tools": {"components": [tool]}, "component": _model(manifest, results)},
        "components": [*_files(manifest), checkpoint, *_texts(manifest), *packages],
        "dependencies": _dependencies(manifest, [package["bom-ref"] for package in packages]),
    }
    serial = uuid.uuid5(_NAMESPACE, json_bytes(bom).decode())
    return json_bytes({**bom, "serialNumber": f"urn:uuid:{serial}"})


def _model(manifest: BundleManifest, results: Mapping[str, Result]) -> dict[str, Any]:
    weights = manifest.files.get(_WEIGHTS)
    if weights is None:
        raise InputError(_WEIGHTS, "is not in the bundle", "Export the bundle again")
    facts = manifest.model.model_dump(exclude={"model_type"}) | {
        "bits_per_weight": round(manifest.bits_per_weight(), 3),
        "targets": ", ".join(manifest.targets),
    }
    return {
        "type": "machine-learning-model",
        "bom-ref": _MODEL,
        "name": str(manifest.recipe.get("name", "")),
        "hashes": _hashes(weights.sha256),
        **_licences(manifest),
        "pedigree": {"ancestors": [_checkpoint(manifest)]},
        "modelCard": _model_card(manifest, results),
        "properties": _properties(facts),
    }


def _model_card(manifest: BundleManifest, results: Mapping[str, Result]) -> dict[str, Any]:
    texts = [{"ref": component["bom-ref"]} for component in _texts(manifest)]
    metrics = [one for name, result in results.items() for one in _metrics(name, result)]
    return {
        "modelParameters": {
            "task": "text-generation",
            "architectureFamily": "decoder-only transformer",
            "modelArchitecture": manifest.model.model_type,
            **({"datasets": texts} if texts else {}),
            "inputs": [{"format": "text"}],
            "outputs": [{"format": "text"}],
        },
        **({"quantitativeAnalysis": {"performanceMetrics": metrics}} if metrics else {}),
    }


def _metrics(name: str, result: Result) -> Iterator[dict[str, Any]]:
    """The figures of one measurement. Each says where it is from: the file, what was measured, and
    on what. A count of instructions is named as one, and a time of an emulated device is none."""
    content = result.content
    if result.kind == EVALUATION:
        texts = [content[key]["file"] for key in ("data", "task") if content[key]]
        of = f"{name}: {content['target'] or 'quantized'} on {', '.join(texts)}"
        for key in _QUALITY:
            value = content["figures"].get(key)
            if isinstance(value, int | float) and math.isfinite(value):
                yield _metric(key, value, of)
    elif result.kind == PROFILE:
        for session in content["sessions"]:
            if session["status"] == "complete" and session["kind"] != "emulated":
                of = f"{name}: {session['artifact']['format']} on {session['device']}"
                yield from _speeds(session, of)
    for counts in result.counts():
        for count in counts["counts"]:
            of = f"{name}: {counts['target']} on {count['cpu']}, counted in emulation"
            for one in count["prefill"]:
                at = f"instructions a prefilled token, {one['from']} to {one['to']} tokens"
                yield _metric(at, one["per_token"], of)
            for one in count["decode"]:
                at = f"instructions a decoded token after {one['depth']} tokens"
                yield _metric(at, one["per_token"], of)


def _speeds(session: Mapping[str, Any], of: str) -> Iterator[dict[str, Any]]:
    """Medians of a profile with their intervals, and the peak of memory."""
    if session["load"]:
        yield _metric("load, ms", session["load"]["p50"], of, session["load"])
    for one in session["prefill"]:
        yield _metric(
            f"first token after {one['tokens']} tokens, ms", one["ms"]["p50"], of, one["ms"]
        )
    for one in session["decode"]:
        yield _metric(f"decode after {one['depth']} tokens, ms", one["ms"]["p50"], of, one["ms"])
    if session["memory"]["peak_rss"] is not None:
        yield _metric("peak resident memory, bytes", session["memory"]["peak_rss"], of)


def _metric(
    kind: str, value: float, of: str, interval: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """One figure; numbers are text in CycloneDX."""
    metric: dict[str, Any] = {"type": kind, "value": json.dumps(value), "slice": of}
    if interval:
        low, high = json.dumps(interval["low"]), json.dumps(interval["high"])
        metric["confidenceInterval"] = {"lowerBound": low, "upperBound": high}
    return metric


def _checkpoint(manifest: BundleManifest) -> dict[str, Any]:
    """The checkpoint that was quantized, with the hashes of its files."""
    url = hub_model(manifest)
    return {
        "type": "machine-learning-model",
        "name": str(manifest.recipe.get("model") or manifest.model.model_type),
        **_licences(manifest),
        **({"purl": url} if url else {}),
        "components": [_file(name, digest) for name, digest in manifest.source.items()],
    }


def _files(manifest: BundleManifest) -> list[dict[str, Any]]:
    return [
        {
            "bom-ref": name,
            **_file(name, entry.sha256),
            "properties": _properties({"bytes": entry.bytes}),
        }
        for name, entry in manifest.files.items()
    ]


def _texts(manifest: BundleManifest) -> list[dict[str, Any]]:
    """The texts of the calibration; two may have the same name."""
    return [
        {
            "type": "data",
            "bom-ref": f"calibration/{number}",
            "name": text.source,
            "scope": "excluded",
            "hashes": _hashes(text.sha256),
            "data": [{"type": "dataset", "name": text.source}],
        }
        for number, text in enumerate(calibration_of(manifest).text)
    ]


def _package(name: str, version: str) -> dict[str, Any]:
    """A package that wrote the bundle; it is no part of what is delivered."""
    url = python_package(name, version)
    named = _named(name, version)
    return {"type": "library", "bom-ref": url, **named, "scope": "excluded", "purl": url}


def _dependencies(manifest: BundleManifest, packages: list[str]) -> list[dict[str, Any]]:
    """What was made from what: the model consists of files; a file was copied from the checkpoint,
    or written from the checkpoint, or, in an artifact, from the quantized weights."""
    read = [_CHECKPOINT, *(component["bom-ref"] for component in _texts(manifest))]
    copied = set(manifest.source.values())
    sources = dict[str, list[str]]()
    for name, entry in manifest.files.items():
        folder = name.split("/")[0]
        if entry.sha256 in copied:
            sources[name] = [_CHECKPOINT]
        elif folder in manifest.targets:
            sources[name] = [_WEIGHTS]
        else:
            sources[name] = read if folder == "quantized" else []
    graph = {_MODEL: [*sources, *packages], **sources, **{name: [] for name in (*read, *packages)}}
    return [{"ref": name, "dependsOn": uses} for name, uses in graph.items()]


def _licences(manifest: BundleManifest) -> dict[str, Any]:
    """The licence by its SPDX id if it has one, else by its name and address."""
    licence = manifest.licence
    if licence is None:
        return {}
    known = licence.spdx()
    if known.endswith("+"):  # SPDX: this version or a later one
        return {"licenses": [{"expression": known}]}
    if known:
        return {"licenses": [{"license": {"id": known}}]}
    link = {"url": licence.link} if licence.link else {}
    return {"licenses": [{"license": {"name": licence.name or licence.id, **link}}]}


def _file(name: str, sha256: str) -> dict[str, Any]:
    return {"type": "file", "name": name, "hashes": _hashes(sha256)}


def _named(name: str, version: str) -> dict[str, str]:
    return {"name": name, **({"version": version} if version else {})}


def _hashes(sha256: str) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": sha256}]


def _properties(facts: Mapping[str, object]) -> list[dict[str, str]]:
    return [
        {
            "name": f"mobilellm:{name}",
            "value": value if isinstance(value, str) else json.dumps(value),
        }
        for name, value in facts.items()
    ]
