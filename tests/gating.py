"""Measurements of a bundle in the form that evaluate, profile and count write, with made-up figures
and the hashes of the bundle's own files."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exporter.bundle.artifact import is_of_model
from exporter.bundle.manifest import BundleManifest

DATA = "d" * 64


def hashes(manifest: BundleManifest, folder: str) -> dict[str, str]:
    """The SHA-256 of each file of a folder of the bundle."""
    return {
        name.removeprefix(f"{folder}/"): entry.sha256
        for name, entry in manifest.files.items()
        if name.startswith(f"{folder}/")
    }


def of_model(manifest: BundleManifest, target: str) -> dict[str, str]:
    """The SHA-256 of each file of the model in an artifact's folder."""
    held = hashes(manifest, target)
    return {name: held[name] for name in held if is_of_model(name, held, target)}


def written(path: Path, content: Mapping[str, Any]) -> Path:
    path.write_text(json.dumps(content))
    return path


def evaluation(manifest: BundleManifest, target: str | None = "onnx", **changes: Any) -> Any:
    """An evaluation on ``text.txt`` and ``problems.jsonl``; `changes` are of its figures, or of the
    keys of the whole that start with ``of_``."""
    figures = {
        "kind": "onnx", "tokens": 8176, "perplexity": 1.533, "perplexity_error": 0.018,
        "kl": 0.0089, "kl_error": 0.0012, "top1_agreement": 0.895, "problems": 500,
        "accuracy": 0.9, "correct": [1] * 450 + [0] * 50,
    }  # fmt: skip
    content = {
        "result": "evaluation", "schema_version": 1, "target": target,
        "files": hashes(manifest, target or "quantized"),
        "data": {"file": "text.txt", "sha256": DATA},
        "task": {"file": "problems.jsonl", "sha256": DATA},
        "reference": dict(manifest.source),
        "settings": {"max_tokens": 8192, "sequence_length": 512, "prefill": 1, "limit": None},
        "versions": {},
        "figures": figures | {k: v for k, v in changes.items() if not k.startswith("of_")},
    }  # fmt: skip
    return content | {k[3:]: v for k, v in changes.items() if k.startswith("of_")}


def profile(
    manifest: BundleManifest,
    times: Mapping[tuple[str, int], Sequence[float]],
    *,
    target: str = "onnx",
    kind: str = "real",
    name: str = "Pixel 8",
    cpu_share: float = 0.98,
    **changes: Any,
) -> Any:
    """A profile with one session. `times` maps (phase, tokens or depth) to the milliseconds of each
    repeat. `changes` are of the session, or of its engine if they start with ``engine_``."""
    repeats = max(map(len, times.values()))
    rounds = [
        [
            {
                "phase": phase, {"prefill": "tokens"}.get(phase, "depth"): place, "ms": [ms[n]],
                "memory": {"peak_rss": 70_000_000 + n},
            }
            for (phase, place), ms in times.items()
        ]
        for n in range(repeats)
    ]  # fmt: skip
    identity = {
        "name": name, "machine": "aarch64", "system": "Android 15", "kernel": "6.1",
        "memory_bytes": 8 << 30, "kind": kind, "soc": "Tensor G3", "kind_reason": "", "cores": [],
        "features": [], "governors": [], "temperatures": {},
    }  # fmt: skip
    operators = [
        {
            "name": "MatMul",
            "calls": 1,
            "milliseconds": 1,
            "share": 1,
            "delegate": "",
            "product": True,
        }
    ]
    engine = {"name": "onnxruntime-python", "versions": {}, "threads": 4, "cores": "4-7"}
    engine |= {k.removeprefix("engine_"): v for k, v in changes.items() if k.startswith("engine_")}
    files = {
        name: {"bytes": 1, "sha256": digest} for name, digest in of_model(manifest, target).items()
    }
    probe = {"seconds": 1.0, "user_seconds": cpu_share, "system_seconds": 0.0, "peak_rss": 7e7}
    session = {
        "device": "adb:123", "kind": kind, "comparable": kind != "emulated", "identity": identity,
        "status": "complete", "problem": None, "engine": engine,
        "artifact": {"format": target, "context": 1024, "files": files},
        "load": None, "first_load_ms": None, "prefill": [], "decode": [], "execute": None,
        "sustained": None, "energy": None, "temperatures": {}, "bandwidth": None,
        "memory": {
            "file_bytes": 1, "available_before": None, "phases": {}, "peak_rss": None,
            "peak_pss": None,
        },
        "operators": operators, "undelegated": [], "predicted": None, "not_measured": {},
        "samples": {"first": [], "rounds": rounds, "probes": [probe] * repeats, "sustained": []},
        **{k: v for k, v in changes.items() if not k.startswith("engine_")},
    }  # fmt: skip
    return {
        "schema_version": 1, "finished": "2026-11-27T12:00:00Z", "versions": {},
        "settings": {
            "prompt_lengths": [64], "depths": [0], "decode_steps": 32, "sustained_seconds": 0,
            "precision": 0.05, "max_repeats": 20, "threads": 4, "timeout": 60.0,
        },
        "sessions": [session],
    }  # fmt: skip


def counts(
    manifest: BundleManifest, per_token: Mapping[str, float], target: str = "executorch"
) -> Any:
    """Instructions on a Cortex-A76: those of each function for a token of a prompt of 128, and
    twice as many for a token after 16."""
    total = sum(per_token.values())
    classes = {"simd": 0, "dot_product": 0, "i8mm": 0}

    def functions(times: int) -> list[dict[str, Any]]:
        return [
            {"function": name, "library": "runner", "near": False, "per_token": times * count}
            for name, count in per_token.items()
        ]

    return {
        "result": "instructions", "schema_version": 1, "target": target,
        "files": of_model(manifest, target),
        "emulator": "qemu-aarch64 7.2.22", "runner": {"name": "native", "versions": {}},
        "context": 1024,
        "counts": [
            {
                "cpu": "cortex-a76",
                "prefill": [
                    {"from": 64, "to": 128, "per_token": total, "classes": classes,
                     "functions": functions(1)}
                ],
                "decode": [
                    {"depth": 16, "per_token": 2 * total, "classes": classes,
                     "functions": functions(2)}
                ],
            }
        ],
    }  # fmt: skip
