"""The quantized checkpoint on disk, in the format that docs/quantized-checkpoint.md specifies.

    mobilellm quantize recipes/mobilellm-r1-nano-int4.yaml \\
        --checkpoint examples/mobilellm-r1-nano -o build/nano-int4
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors import safe_open

from exporter.errors import InputError
from exporter.files import (
    Output,
    copy_file,
    differing_files,
    is_finished,
    package_versions,
    read_json,
    sha256,
    write_json,
)
from exporter.model.checkpoint import (
    COMPANION_FILES,
    WEIGHT_DTYPES,
    Checkpoint,
    companions,
    special_tokens,
)
from exporter.model.config import ModelConfig, parse_config
from exporter.model.licence import LicenceTerms
from exporter.progress import OnTensor
from exporter.quantization.plan import QuantizationPlan
from exporter.quantization.rounding import LARGEST_SCALE, problem_with_values, quantize
from exporter.quantization.schemes import (
    FLOAT,
    QuantizedTensor,
    Scheme,
    entry_name,
    pack_entries,
    parse_scheme,
    unpack_entry,
)
from exporter.settings import FileHashes, Section, parse_section
from exporter.tensors import (
    SAFETENSORS_NAMES,
    read_header,
    tensor_bytes,
    write_safetensors,
)

FORMAT_VERSION = 1
WEIGHTS, MANIFEST = "quantized.safetensors", "quantization.json"

#: The folder of the reports of a calibration.
REPORTS = "calibration"

QUANTIZED_OUTPUT = Output(WEIGHTS, MANIFEST, (*COMPANION_FILES, REPORTS))


class _StoredTensor(Section):
    """A tensor in the manifest; `reason` says why it is left in float."""

    scheme: str
    reason: str = ""


class _Manifest(Section):
    """The content of ``quantization.json``."""

    format_version: int
    model_type: str
    method: str
    tensors: dict[str, _StoredTensor]
    source: dict[str, str]
    versions: dict[str, str]
    files: FileHashes
    calibration: dict[str, Any] = Field(default_factory=dict)
    license: LicenceTerms | None = None


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """A quantized checkpoint on disk; tensors are memory-mapped and read one at a time."""

    path: Path
    config: ModelConfig
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    manifest: Mapping[str, Any]
    schemes: Mapping[str, Scheme]
    licence: LicenceTerms | None

    def read(self, name: str) -> QuantizedTensor | torch.Tensor:
        """Codes and scales of a quantized weight, or the float tensor as stored."""
        scheme = self.schemes[name]
        with safe_open(self.path / WEIGHTS, framework="pt") as file:
            if scheme == FLOAT:
                tensor: torch.Tensor = file.get_tensor(name)
                return tensor
            return unpack_entry(name, scheme, file.get_tensor)

    def float_weight(self, name: str) -> torch.Tensor:
        """The dequantized weight in float32, or the float tensor converted to float32."""
        stored = self.read(name)
        if isinstance(stored, QuantizedTensor):
            return stored.dequantize()
        return stored.to(torch.float32)


def write_quantized(
    checkpoint: Checkpoint,
    plan: QuantizationPlan,
    identity: Mapping[str, Any],
    out: Path,
    on_tensor: OnTensor,
    calibrated: Mapping[str, QuantizedTensor] | None = None,
    reports: Collection[str] = (),
) -> QuantizedCheckpoint:
    """Write a quantized checkpoint tensor by tensor into a folder; the manifest is written last.

    The codes are those of `calibrated`; if it is None, each weight is rounded by the plan's method.
    `reports` names the files in `out` that are listed in the manifest too. Raises InputError for a
    weight whose scale is too large for float16.
    """
    (out / MANIFEST).unlink(missing_ok=True)
    packed = dict[str, torch.Tensor]()

    def produce(entry: str) -> torch.Tensor:
        """The tensor of one entry. The parts of a weight are consecutive, so the last weight is
        cached."""
        nonlocal packed
        if entry in plan.schemes:
            on_tensor(entry)
            return checkpoint.read(entry)
        if entry not in packed:
            name = weight_of[entry]
            if calibrated is None:
                result = quantize(checkpoint.read(name), plan.schemes[name], plan.method)
            else:
                result = calibrated[name]
            _check_range(name, result)
            packed = pack_entries({name: result})
            on_tensor(name)
        return packed[entry]

    layout, weight_of = dict[str, tuple[torch.dtype, tuple[int, ...]]](), dict[str, str]()
    for name, stored in checkpoint.tensors.items():
        entries = _entries(name, plan.schemes[name], stored.shape, stored.dtype)
        layout |= entries
        weight_of |= dict.fromkeys(entries, name)
    write_safetensors(out / WEIGHTS, layout, produce, {"format": "pt"})
    copied = companions(checkpoint.path)
    for name in copied:
        copy_file(checkpoint.path / name, out / name)
    for name in set(COMPANION_FILES).difference(copied):
        (out / name).unlink(missing_ok=True)
    written = [WEIGHTS, *reports, *copied]
    hashes = {name: sha256(out / name) for name in written}
    write_json(out / MANIFEST, {**identity, "files": hashes})
    return open_quantized(out)


def finished_quantized(out: Path, identity: Mapping[str, Any]) -> QuantizedCheckpoint | None:
    """The quantized checkpoint in `out` if it is complete and has this identity, else None."""
    return open_quantized(out) if is_finished(out / MANIFEST, identity) else None


def quantized_identity(
    checkpoint: "Checkpoint | QuantizedCheckpoint",
    plan: QuantizationPlan,
    source: Mapping[str, str],
    calibration: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything that decides the bytes of a quantized checkpoint, its calibration included.

    `source` has the hashes of the checkpoint's files (`source_hashes`).
    """
    licence = checkpoint.licence
    return {
        **({"calibration": dict(calibration)} if calibration else {}),
        **({"license": licence.model_dump()} if licence else {}),
        "format_version": FORMAT_VERSION,
        "model_type": checkpoint.config.model_type,
        "method": plan.method,
        "tensors": {
            name: {"scheme": str(scheme)}
            | ({"reason": plan.reasons[name]} if scheme == FLOAT else {})
            for name, scheme in plan.schemes.items()
        },
        "source": dict(source),
        "versions": package_versions("mobilellm-exporter", "torch", "safetensors"),
    }


def source_hashes(checkpoint: Checkpoint) -> dict[str, str]:
    """The SHA-256 of the checkpoint's weight files and companion files: file name → hash.

    It reads the whole checkpoint, so a run calls it once and passes the result on.
    """
    weights = {stored.file for stored in checkpoint.tensors.values()}
    beside = {checkpoint.path / name for name in companions(checkpoint.path)}
    return {file.name: sha256(file) for file in sorted(weights | beside)}


def weight_bytes(quantized: "QuantizedCheckpoint") -> dict[str, int]:
    """The bytes of every weight in the file, codes and scales together."""
    header, shapes = read_header(quantized.path / WEIGHTS), quantized.config.parameter_shapes()
    return {
        name: sum(
            tensor_bytes(*header[entry])
            for entry in _entries(name, quantized.schemes[name], shape, torch.float32)
        )
        for name, shape in shapes.items()
    }


def _entries(
    name: str, scheme: Scheme, shape: tuple[int, ...], float_type: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The entries of one tensor in the file, with types and shapes; `float_type` is the type of a
    tensor that is left in float."""
    if scheme == FLOAT:
        return {name: (float_type, shape)}
    return {entry_name(name, part): stored for part, stored in scheme.parts(shape).items()}


def _check_range(name: str, result: QuantizedTensor) -> None:
    if result.scales.max() >= LARGEST_SCALE:
        raise InputError(
            name,
            f"its weights need a scale of {LARGEST_SCALE} or more, which float16 cannot hold",
            "Keep it in float with an override",
        )


def open_quantized(folder: Path) -> QuantizedCheckpoint:
    """Open a quantized checkpoint and check that its entries are complete. Raises InputError."""
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{folder / MANIFEST}: format_version",
            f"{manifest.get('format_version')!r} is not known",
            f"This version reads {FORMAT_VERSION}; quantize the checkpoint again",
        )
    config = parse_config(read_json(folder / "config.json"), folder / "config.json")
    bos, eos = special_tokens(folder, config.vocab_size)
    companions(folder)
    shapes = config.parameter_shapes()
    checked = parse_section(_Manifest, manifest, str(folder / MANIFEST), remedy="Quantize again")
    tensors = checked.tensors
    if set(tensors) != set(shapes):
        raise InputError(
            f"{folder / MANIFEST}: tensors", "does not list the model's tensors", "Quantize again"
        )
    schemes = _stored_schemes(tensors, shapes, folder / MANIFEST)
    licence = checked.license
    quantized = QuantizedCheckpoint(folder, config, bos, eos, manifest, schemes, licence)
    _check_entries(quantized)
    return quantized


def _stored_schemes(
    tensors: Mapping[str, _StoredTensor], shapes: Mapping[str, tuple[int, ...]], manifest: Path
) -> dict[str, Scheme]:
    """The scheme of every tensor; each distinct one is parsed once. Raises InputError."""
    schemes, parsed = dict[str, Scheme](), dict[str, Scheme]()
    for name, entry in tensors.items():
        scheme = parsed.get(entry.scheme)
        if scheme is None:
            scheme = parse_scheme(entry.scheme, f"{manifest}: {name}")
            parsed[str(scheme)] = scheme
        problem = scheme.problem_with(shapes[name])
        if scheme == FLOAT and not entry.reason:
            problem = "is left in float without a reason"
        if problem:
            raise InputError(f"{manifest}: {name}", problem, "Quantize again")
        schemes[name] = scheme
    return schemes


def require_whole(quantized: QuantizedCheckpoint) -> None:
    """Check every file against its hash in the manifest. Raises InputError for the first that
    differs."""
    for name, problem in differing_files(quantized.path, quantized.manifest["files"]).items():
        raise InputError(quantized.path / name, problem, "It is damaged: quantize again")


def _check_entries(quantized: QuantizedCheckpoint) -> None:
    file = quantized.path / WEIGHTS
    held = read_header(file, "Quantize the checkpoint again")
    for name, shape in quantized.config.parameter_shapes().items():
        scheme = quantized.schemes[name]
        for entry, (dtype, entry_shape) in _entries(name, scheme, shape, torch.float32).items():
            kinds = WEIGHT_DTYPES if scheme == FLOAT else (SAFETENSORS_NAMES[dtype],)
            kind, found = held.pop(entry, ("", None))
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
    if held:
        raise InputError(f"{file}: {min(held)}", "does not belong to this model")


def damaged_tensors(quantized: QuantizedCheckpoint) -> dict[str, str]:
    """Tensors with a value that the format does not allow: name → what is wrong."""
    problems = dict[str, str]()
    for name in quantized.schemes:
        stored = quantized.read(name)
        if not isinstance(stored, QuantizedTensor):
            if not torch.isfinite(stored).all():
                problems[name] = "holds NaN or infinity"
        elif problem := problem_with_values(stored):
            problems[name] = problem
    return problems
