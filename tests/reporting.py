"""Measurements of a bundle in the form of evaluate, profile and count, for tests of the report.

The figures are made up; the hashes are those of the bundle.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gating import hashes

from devices.session_state import summaries
from exporter.bundle.artifact import is_of_model
from exporter.bundle.manifest import BundleManifest, read_manifest

BANDS = [(0, 15), (16, 31), (32, 63), (64, 127)]
SETTINGS = {
    "prompt_lengths": [64], "depths": [0, 512], "decode_steps": 8, "sustained_seconds": 0,
    "precision": 0.05, "max_repeats": 8, "threads": 4, "timeout": 60.0,
}  # fmt: skip
OPERATORS = [
    ("Fully Connected (NC, QDU8, F32, QB4W) GEMM", 40, 6.0, "XnnpackBackend", True),
    ("Softmax", 6, 3.0, "XnnpackBackend", False),
    ("add.out", 12, 1.0, "", False),
]


def evaluation(
    manifest: BundleManifest, target: str | None, divergence: float, **figures: Any
) -> dict[str, Any]:
    """An evaluation with KL by position, and by layer for the quantized checkpoint (None)."""
    kl = divergence
    layers = ["model.embed_tokens", *(f"model.layers.{n}" for n in range(manifest.model.layers))]
    bands = [
        {"first": a, "last": z, "perplexity": 1.6, "kl": kl * (1 + place / 4),
         "top1_agreement": 1 - kl}
        for place, (a, z) in enumerate(BANDS)
    ]  # fmt: skip
    file = {"file": "problems.jsonl", "sha256": "a" * 64}
    return {
        "result": "evaluation", "schema_version": 1, "target": target,
        "files": hashes(manifest, target or "quantized"),
        "data": file, "task": file if target else None, "reference": dict(manifest.source),
        "settings": {"max_tokens": 8192, "sequence_length": 512, "prefill": 1, "limit": None},
        "versions": {"torch": "2.13.0"},
        "figures": {
            "kind": "coreml, interpreted" if target == "coreml" else target or "torch",
            "tokens": 8176, "sequences": 16, "perplexity": 1.6 + kl, "perplexity_error": 0.02,
            "reference_perplexity": 1.6, "kl": kl, "kl_error": kl / 10, "top1_agreement": 1 - kl,
            "agreement_by_position": bands, "problems": 500 if target else None,
            "accuracy": 0.95 - kl if target else None, "never_ended": 0.01 if target else None,
            "kl_by_layer": None if target else [
                {"layer": name, "kl": kl / (2 + place)} for place, name in enumerate(layers)
            ],
            **figures,
        },
    }  # fmt: skip


def session(
    manifest: BundleManifest, target: str, milliseconds: float, **changes: Any
) -> dict[str, Any]:
    """A session on a phone: 8 repeats, 8 decode steps at each of two depths."""
    memory = {
        "peak_rss": 70_000_000, "rss": 60_000_000, "anonymous": 20_000_000, "file": 40_000_000,
        "pss": -1,
    }  # fmt: skip
    rounds = [
        [
            {"phase": "load", "ms": [20.0 + repeat], "memory": memory},
            {"phase": "prefill", "tokens": 64, "memory": memory,
             "ms": [10 * milliseconds + repeat]},
            *(
                {"phase": "decode", "depth": depth, "memory": memory,
                 "ms": [milliseconds * (1 + (7 * step + repeat) % 5 / 50) for step in range(8)]}
                for depth in (0, 512)
            ),
        ]
        for repeat in range(8)
    ]  # fmt: skip
    found = summaries(rounds)

    def entry(phase: str, key: str, place: int, tokens: int) -> dict[str, Any]:
        times = found[phase, place]
        ms = {**asdict(times), "narrow": True}
        return {key: place, "ms": ms, "tokens_per_second": asdict(times.inverse(1000.0 * tokens))}

    held = hashes(manifest, target)
    files = {
        name: {"bytes": 1, "sha256": digest}
        for name, digest in held.items()
        if is_of_model(name, held, target)
    }
    identity = {
        "name": "Pixel 8", "machine": "aarch64", "system": "Android 15", "kernel": "6.1",
        "memory_bytes": 8 << 30, "kind": "real", "soc": "Tensor G3", "kind_reason": "",
        "cores": [{"name": "Cortex-X3", "count": 1, "max_khz": None}], "features": [],
        "governors": [], "temperatures": {},
    }  # fmt: skip
    total = sum(row[2] for row in OPERATORS)
    made = {
        "device": "adb:123", "kind": "real", "comparable": True, "identity": identity,
        "status": "complete", "problem": None,
        "artifact": {"format": target, "context": 1024, "files": files},
        "engine": {"name": "executorch-native", "versions": {"executorch": "1.5.1"}, "threads": 4},
        "load": {**asdict(found["load", 0]), "narrow": True}, "first_load_ms": 30.0,
        "prefill": [entry("prefill", "tokens", 64, 64)],
        "decode": [entry("decode", "depth", depth, 1) for depth in (0, 512)],
        "execute": None,
        "sustained": {
            "seconds": 10.0, "tokens": 900, "tokens_per_second": [100.0, 90.0],
            "last_to_best": 0.9, "p90_ms": 12.0, "thermal": [], "hottest": None,
        },
        "energy": None,
        "memory": {
            "file_bytes": 1, "available_before": None, "phases": {"load": memory, "decode": memory},
            "peak_rss": 70_000_000, "peak_pss": None,
        },
        "temperatures": {}, "bandwidth": None,
        "operators": [
            {"name": name, "calls": calls, "milliseconds": ms, "share": ms / total,
             "delegate": delegate, "product": product}
            for name, calls, ms, delegate, product in OPERATORS
        ],
        "undelegated": [], "predicted": None, "not_measured": {},
        "samples": {"first": [], "rounds": rounds, "probes": [], "sustained": []},
        **changes,
    }  # fmt: skip
    made["comparable"] = made["kind"] != "emulated"
    made["identity"] = made["identity"] and {**made["identity"], "kind": made["kind"]}
    return made


def profile(sessions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A report of `mobilellm profile` with these sessions."""
    return {
        "schema_version": 1, "finished": "2026-11-27T12:00:00Z", "versions": {},
        "settings": SETTINGS, "sessions": list(sessions),
    }  # fmt: skip


def counts(manifest: BundleManifest, functions: Mapping[str, float]) -> dict[str, Any]:
    """Instructions on a Cortex-A76 by function, for a prompt and after 16 tokens."""
    counted = [
        {"function": name, "library": "runner", "near": place == 1, "per_token": number}
        for place, (name, number) in enumerate(functions.items())
    ]
    total = sum(functions.values())
    entry = {
        "per_token": total, "functions": counted,
        "classes": {"simd": total / 2, "dot_product": total / 4, "i8mm": 0},
        "bytes": {"loaded": 3 * total, "stored": total / 10, "unsized": 0},
    }  # fmt: skip
    return {
        "result": "instructions", "schema_version": 2, "target": "executorch",
        "files": hashes(manifest, "executorch"),
        "emulator": "qemu-aarch64 7.2.22",
        "runner": {"name": "executorch-native", "versions": {"executorch": "1.5.1"}},
        "context": 1024,
        "counts": [
            {"cpu": "cortex-a76", "prefill": [{"from": 64, "to": 128, **entry}],
             "decode": [{"depth": 16, **entry}]}
        ],
    }  # fmt: skip


def measurements(bundle: Path, out: Path, scale: float = 1.0) -> list[Path]:
    """Every kind of measurement of a bundle, written to `out`: quality of each target and of the
    quantized checkpoint, sessions of a phone, of a virtual and of an emulated machine and one that
    failed, and instructions."""
    manifest = read_manifest(bundle)
    made = {
        f"quality-{target}": evaluation(manifest, target, kl * scale)
        for target, kl in (("executorch", 0.03), ("onnx", 0.02), ("coreml", 0.01), (None, 0.01))
        if target in (None, *manifest.targets)
    }
    native, other = "executorch", "onnx"
    made["speed"] = profile(
        [
            session(manifest, native, 5.0 * scale),
            session(manifest, other, 6.0 * scale, undelegated=["MatMul reached no delegate"]),
            session(manifest, native, 2.0 * scale, device="host", kind="virtual"),
            session(manifest, native, 90.0 * scale, device="ssh:qemu", kind="emulated"),
            session(manifest, other, 1.0, device="ssh:pi", status="failed", problem="no route"),
        ]
    )
    functions = {"kai_matmul_int4": 40e6, "xnn_f32_gemm": 27e6, "softmax": 2.2e6}
    made["counts"] = counts(manifest, {k: v * scale for k, v in functions.items()})
    out.mkdir(parents=True, exist_ok=True)
    for name, content in made.items():
        (out / f"{name}.json").write_text(json.dumps(content))
    return sorted(out.glob("*.json"))
