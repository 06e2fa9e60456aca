"""The quantized checkpoint on disk, in the format that docs/quantized-checkpoint.md specifies.

    mobilellm quantize recipes/mobilellm-r1-nano-int4.yaml \\
        --checkpoint examples/mobilellm-r1-nano -o build/nano-int4
"""

import fnmatch
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from exporter.errors import InputError
from exporter.files import (
    Output,
    copy_file,
    differing_files,
    made_from,
    package_versions,
    read_json,
    sha256,
    write_json,
    write_safetensors,
)
from exporter.model.checkpoint import (
    COMPANION_FILES,
    WEIGHT_DTYPES,
    Checkpoint,
    parse_config,
    special_tokens,
)
from exporter.model.decoder import ModelConfig
from exporter.quantization.schemes import (
    CODE_RANGE,
    FLOAT,
    LARGEST_SCALE,
    QuantizedTensor,
    Scheme,
    pack_int4,
    parse_scheme,
    quantize,
    to_scale_grid,
    unpack_int4,
)

FORMAT_VERSION = 1
WEIGHTS, MANIFEST = "quantized.safetensors", "quantization.json"
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"

#: What a calibration reports, as files in a folder of this name.
REPORTS = "calibration"

#: Called with a tensor's name when it is done: progress for whoever shows it.
OnTensor = Callable[[str], None]

QUANTIZED_OUTPUT = Output(WEIGHTS, MANIFEST, (*COMPANION_FILES, REPORTS))
DEQUANTIZED_OUTPUT = Output("model.safetensors", "config.json", COMPANION_FILES)


@dataclass(frozen=True)
class Plan:
    """How scales are chosen, the scheme of every tensor, and why some are left in float."""

    method: str
    schemes: Mapping[str, Scheme]
    reasons: Mapping[str, str]


def plan_schemes(
    shapes: Mapping[str, tuple[int, ...]],
    linear: Scheme,
    embedding: Scheme,
    overrides: Mapping[str, Scheme],
    method: str,
) -> Plan:
    """Decide how each tensor is stored; the last override whose pattern matches wins.

    Raises InputError for a pattern that matches nothing and for a scheme that does not fit.
    """
    schemes, reasons = dict[str, Scheme](), dict[str, str]()
    for name, shape in shapes.items():
        if len(shape) != 2:
            schemes[name], reasons[name] = FLOAT, "a normalization weight, one vector"
        else:
            schemes[name] = embedding if name == EMBEDDING else linear
    for pattern, scheme in overrides.items():
        matched = [name for name in shapes if fnmatch.fnmatchcase(name, pattern)]
        if not matched:
            raise InputError(
                f"quantization.overrides: {pattern}",
                "matches no tensor of this checkpoint",
                f"Names look like {next(n for n in shapes if n.endswith('q_proj.weight'))}",
            )
        schemes |= dict.fromkeys(matched, scheme)
    for name, shape in shapes.items():
        problem = schemes[name].problem_with(shape)
        if problem:
            raise InputError(
                f"quantization of {name}", problem, "Choose another scheme for it with an override"
            )
        if schemes[name] == FLOAT:
            reasons.setdefault(name, "the recipe keeps it in float")
    return Plan(method, schemes, reasons)


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """A quantized checkpoint on disk; tensors are memory-mapped and read one at a time."""

    path: Path
    config: ModelConfig
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    manifest: Mapping[str, Any]
    schemes: Mapping[str, Scheme]

    def read(self, name: str) -> QuantizedTensor | torch.Tensor:
        """Codes and scales of a quantized weight, or the float tensor as stored."""
        scheme = self.schemes[name]
        with safe_open(self.path / WEIGHTS, framework="pt") as file:
            if scheme == FLOAT:
                tensor: torch.Tensor = file.get_tensor(name)
                return tensor
            codes, scales = file.get_tensor(f"{name}.codes"), file.get_tensor(f"{name}.scales")
        codes = unpack_int4(codes) if scheme.bits == 4 else codes
        return QuantizedTensor(codes, scales.to(torch.float32), scheme)

    def float_weight(self, name: str) -> torch.Tensor:
        """The weight as float32, exactly what the codes stand for."""
        stored = self.read(name)
        if isinstance(stored, QuantizedTensor):
            return stored.dequantize()
        return stored.to(torch.float32)


def write_quantized(
    checkpoint: Checkpoint,
    plan: Plan,
    identity: Mapping[str, Any],
    out: Path,
    on_tensor: OnTensor,
    calibrated: Mapping[str, QuantizedTensor] | None = None,
    reports: Collection[str] = (),
) -> QuantizedCheckpoint:
    """Write a quantized checkpoint tensor by tensor into a folder; the manifest is written last.

    Integers are those of `calibrated`, or each weight is rounded for itself. `reports` names files
    of the folder that belong to it.
    """
    (out / MANIFEST).unlink(missing_ok=True)
    done: tuple[str, QuantizedTensor] | None = None

    def produce(entry: str) -> torch.Tensor:
        """The tensor of one entry; codes come before their scales, so one weight is kept."""
        nonlocal done
        name, _, part = entry.rpartition(".")
        if entry in plan.schemes:
            on_tensor(entry)
            return checkpoint.read(entry)
        if part == "codes":
            if calibrated is None:
                result = quantize(checkpoint.read(name), plan.schemes[name], plan.method)
            else:
                result = calibrated[name]
            _check_range(name, result)
            done = name, result
            on_tensor(name)
            return pack_int4(result.codes) if result.scheme.bits == 4 else result.codes
        assert done is not None and done[0] == name
        return done[1].scales.to(torch.float16)

    write_safetensors(out / WEIGHTS, _layout(checkpoint, plan), produce, {"format": "pt"})
    written = [WEIGHTS, *reports]
    for name in COMPANION_FILES:
        if (checkpoint.path / name).is_file():
            copy_file(checkpoint.path / name, out / name)
            written.append(name)
        else:
            (out / name).unlink(missing_ok=True)
    hashes = {name: sha256(out / name) for name in written}
    write_json(out / MANIFEST, {**identity, "files": hashes})
    return open_quantized(out)


def finished_quantized(out: Path, identity: Mapping[str, Any]) -> QuantizedCheckpoint | None:
    """The finished quantized checkpoint in `out` if it is of this `quantized_identity`."""
    if not made_from(out / MANIFEST, identity):
        return None
    hashes = read_json(out / MANIFEST)["files"]
    return None if differing_files(out, hashes) else open_quantized(out)


def quantized_identity(
    checkpoint: Checkpoint, plan: Plan, calibration: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Everything that decides the bytes of a quantized checkpoint, its calibration included."""
    return {
        **({"calibration": dict(calibration)} if calibration else {}),
        "format_version": FORMAT_VERSION,
        "model_type": checkpoint.config.model_type,
        "method": plan.method,
        "tensors": {
            name: {"scheme": str(scheme)}
            | ({"reason": plan.reasons[name]} if scheme == FLOAT else {})
            for name, scheme in plan.schemes.items()
        },
        "source": source_hashes(checkpoint),
        "versions": package_versions("mobilellm-exporter", "torch", "safetensors"),
    }


def source_hashes(checkpoint: Checkpoint) -> dict[str, str]:
    """sha256 of every file of the checkpoint that decides the result."""
    weights = {stored.file for stored in checkpoint.tensors.values()}
    companions = {checkpoint.path / name for name in COMPANION_FILES}
    return {file.name: sha256(file) for file in sorted(weights | companions) if file.is_file()}


def _layout(checkpoint: Checkpoint, plan: Plan) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]()
    for name, stored in checkpoint.tensors.items():
        scheme = plan.schemes[name]
        if scheme == FLOAT:
            layout[name] = stored.dtype, stored.shape
            continue
        rows, columns = stored.shape
        int4 = scheme.bits == 4
        layout[f"{name}.codes"] = (
            (torch.uint8, (rows, columns // 2)) if int4 else (torch.int8, (rows, columns))
        )
        layout[f"{name}.scales"] = torch.float16, scheme.scale_shape(stored.shape)
    return layout


def _check_range(name: str, result: QuantizedTensor) -> None:
    if result.scales.max() >= LARGEST_SCALE:
        raise InputError(
            name,
            f"its weights need a scale of {LARGEST_SCALE} or more, which float16 cannot hold",
            "Keep it in float with an override",
        )


def open_quantized(folder: Path) -> QuantizedCheckpoint:
    """Open a quantized checkpoint and check that it is whole. Raises InputError."""
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{folder / MANIFEST}: format_version",
            f"{manifest.get('format_version')!r} is not known",
            f"This version reads {FORMAT_VERSION}; quantize the checkpoint again",
        )
    config = parse_config(read_json(folder / "config.json"), folder / "config.json")
    bos, eos = special_tokens(folder, config.vocab_size)
    tensors = manifest.get("tensors")
    shapes = config.parameter_shapes()
    if not isinstance(tensors, dict) or set(tensors) != set(shapes):
        raise InputError(
            f"{folder / MANIFEST}: tensors", "does not list the model's tensors", "Quantize again"
        )
    if not isinstance(manifest.get("files"), dict):
        raise InputError(f"{folder / MANIFEST}: files", "is missing", "Quantize again")
    schemes = {
        name: _stored_scheme(entry, shapes[name], f"{folder / MANIFEST}: {name}")
        for name, entry in tensors.items()
    }
    quantized = QuantizedCheckpoint(folder, config, bos, eos, manifest, schemes)
    _check_entries(quantized)
    return quantized


def _stored_scheme(entry: object, shape: tuple[int, ...], subject: str) -> Scheme:
    scheme = parse_scheme(entry.get("scheme") if isinstance(entry, dict) else None, subject)
    problem = scheme.problem_with(shape)
    if problem:
        raise InputError(subject, problem, "Quantize again")
    return scheme


def require_whole(quantized: QuantizedCheckpoint) -> None:
    """Raise InputError for the first file that is not what the manifest's hash says."""
    for name, problem in differing_files(quantized.path, quantized.manifest["files"]).items():
        raise InputError(quantized.path / name, problem, "It is damaged: quantize again")


def _check_entries(quantized: QuantizedCheckpoint) -> None:
    file = quantized.path / WEIGHTS
    try:
        with safe_open(file, framework="pt") as handle:
            names = handle.keys()
            slices = {name: handle.get_slice(name) for name in names}
            present = {n: (tuple(s.get_shape()), s.get_dtype()) for n, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise InputError(
            file, f"is not a whole safetensors file ({error})", "Quantize the checkpoint again"
        ) from error
    for name, shape in quantized.config.parameter_shapes().items():
        scheme = quantized.schemes[name]
        expected: dict[str, tuple[tuple[int, ...], Collection[str]]]
        expected = {name: (shape, WEIGHT_DTYPES)}
        if scheme != FLOAT:
            int4 = scheme.bits == 4
            columns = shape[1] // 2 if int4 else shape[1]
            expected = {
                f"{name}.codes": ((shape[0], columns), ("U8",) if int4 else ("I8",)),
                f"{name}.scales": (scheme.scale_shape(shape), ("F16",)),
            }
        for entry, (entry_shape, kinds) in expected.items():
            found, kind = present.pop(entry, (None, ""))
            if found != entry_shape:
                raise InputError(
                    f"{file}: {entry}",
                    f"is missing or not of shape {list(entry_shape)}",
                    "Quantize the checkpoint again",
                )
            if kind not in kinds:
                raise InputError(
                    f"{file}: {entry}", f"has dtype {kind}", "Quantize the checkpoint again"
                )
    if present:
        raise InputError(f"{file}: {sorted(present)[0]}", "does not belong to this model")


def damaged_tensors(quantized: QuantizedCheckpoint) -> dict[str, str]:
    """Tensors whose codes or scales break the format's promises: name → what is wrong."""
    problems = dict[str, str]()
    for name, scheme in quantized.schemes.items():
        stored = quantized.read(name)
        if not isinstance(stored, QuantizedTensor):
            if not torch.isfinite(stored).all():
                problems[name] = "holds NaN or infinity"
            continue
        assert scheme.bits is not None
        lowest, highest = CODE_RANGE[scheme.bits]
        if stored.codes.min() < lowest or stored.codes.max() > highest:
            problems[name] = f"has a code outside {lowest}..{highest}"
        elif not torch.equal(to_scale_grid(stored.scales), stored.scales):
            worst = stored.scales[to_scale_grid(stored.scales) != stored.scales][0].item()
            problems[name] = f"has the scale {worst}, which is not on the portable grid"
    return problems


def write_dequantized(
    quantized: QuantizedCheckpoint, dtype: torch.dtype, out: Path, on_tensor: OnTensor
) -> None:
    """An ordinary Hugging Face folder with the quantized values, for any other engine.

    float32 is exact. float16 and bfloat16 round each product of code and scale to 11 and 8
    significant bits: an int4 code times a scale needs up to 11, so float16 is exact for int4 too
    unless the product is below 2^-14.
    """

    def produce(name: str) -> torch.Tensor:
        on_tensor(name)
        return quantized.float_weight(name).to(dtype)

    layout = {name: (dtype, shape) for name, shape in quantized.config.parameter_shapes().items()}
    write_safetensors(out / "model.safetensors", layout, produce, {"format": "pt"})
    for name in reversed(COMPANION_FILES):  # config.json last
        if (quantized.path / name).is_file():
            copy_file(quantized.path / name, out / name)
