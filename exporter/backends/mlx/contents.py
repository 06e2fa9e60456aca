"""Read an MLX folder, which may come from anywhere, and compare it with another.

Only what `lowering` may write is accepted: every key of config.json, and every tensor with the type
and the shape that config.json gives it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from exporter.backends import _comparison
from exporter.backends.mlx import CONFIG, FILE_NAME, TOKENIZER
from exporter.backends.mlx.layout import (
    GROUPS,
    OFFSETS,
    TYPES,
    Affine,
    Entries,
    entries_of,
    part,
    unpack,
    wrong_biases,
)
from exporter.backends.mlx.lowering import ORIGIN, options, quantization
from exporter.errors import InputError, short
from exporter.foreign import read_json
from exporter.model.config import ModelConfig, parse_config
from exporter.model.equivalent import client_config
from exporter.quantization.equivalent_checkpoint import as_equivalent
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint
from exporter.quantization.schemes import FLOAT, QuantizedTensor
from exporter.tensors import SAFETENSORS_NAMES, read_header

_REMEDY = "Get the folder again, or lower the model again"
_QUANTIZATION = ("quantization", "quantization_config")
#: Every way in which a weight may be stored.
_WAYS = tuple(Affine(bits, group) for bits in OFFSETS for group in GROUPS)


@dataclass(frozen=True)
class Contents:
    """A folder: the model that its config.json describes, and how each weight is stored. `stored`
    has None for a weight in float."""

    path: Path
    config: ModelConfig
    stored: Mapping[str, Affine | None]

    @property
    def file(self) -> Path:
        """The file of the weights."""
        return self.path / FILE_NAME

    def tensor(self, name: str) -> Tensor:
        """A tensor of the file."""
        return _read(self.file, name)


def open_contents(path: Path) -> Contents:
    """Read config.json and the header of the weights. Raises InputError for everything that
    `lowering` would not write there."""
    raw = read_json(path / CONFIG)
    described = {key: value for key, value in raw.items() if key not in _QUANTIZATION}
    config = parse_config(described, path / CONFIG)
    activations = raw.get("dtype")
    if not isinstance(activations, str) or activations not in TYPES:
        known = ", ".join(TYPES)
        raise InputError(f"{path / CONFIG}: dtype", f"{short(activations)} is not one of {known}")
    shapes = config.parameter_shapes()
    stored = dict(_stored(raw.get("quantization"), shapes, path))
    _check_config(raw, config, activations, stored, path)
    layout = Entries()
    for name, shape in shapes.items():
        layout |= entries_of(name, shape, stored[name], TYPES[activations])
    _check_header(path / FILE_NAME, layout)
    return Contents(path, config, stored)


def _stored(
    content: object, shapes: Mapping[str, tuple[int, ...]], path: Path
) -> Iterator[tuple[str, Affine | None]]:
    """How each weight is stored, from the value of ``quantization``."""
    matrices = {name for name, shape in shapes.items() if len(shape) == 2}
    if content is None:
        yield from dict.fromkeys(shapes).items()
        return
    subject = f"{path / CONFIG}: quantization"
    if not isinstance(content, dict):
        raise InputError(subject, f"{short(content)} is not an object", _REMEDY)
    usual = {key: content.get(key) for key in ("group_size", "bits")}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        given = content.get(module, usual) if name in matrices else False
        yield name, None if given is False else _affine(given, shape, f"{subject}.{module}")


def _affine(given: object, shape: tuple[int, ...], subject: str) -> Affine:
    affine = next((way for way in _WAYS if given == options(way)), None)
    if affine is None:
        raise InputError(subject, f"{short(given)} is not a way to store weights here", _REMEDY)
    if shape[1] % affine.group:
        problem = f"groups of {affine.group} do not divide rows of {shape[1]}"
        raise InputError(subject, problem, _REMEDY)
    return affine


def _check_config(
    raw: Mapping[str, Any],
    config: ModelConfig,
    activations: str,
    stored: Mapping[str, Affine | None],
    path: Path,
) -> None:
    """Refuse every key and value that `lowering` would not write for this model: some make mlx-lm
    import Python from the folder (``model_file``), or compute something else."""
    if config.model_type == "llama4_text":
        raise InputError(f"{path / CONFIG}: model_type", "'llama4_text' is not written here")
    ends = raw.get("eos_token_id")
    expected = {
        **client_config(config, raw.get("bos_token_id"), (), activations),
        "eos_token_id": ends,
        **quantization(stored, config.parameter_shapes()),
        ORIGIN: raw.get(ORIGIN),
    }
    _check_tokens(raw, path)
    for place, problem in _comparison.differences(raw, expected):
        raise InputError(f"{path / CONFIG}: {place}", problem, _REMEDY)


def _check_tokens(raw: Mapping[str, Any], path: Path) -> None:
    for key in ("bos_token_id", "eos_token_id"):
        value = raw.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(token, int) for token in ids):
            raise InputError(f"{path / CONFIG}: {key}", f"{short(value)} is not an id", _REMEDY)


def _check_header(file: Path, layout: Entries) -> None:
    """The file has these tensors, with these types and shapes, and no others."""
    found = read_header(file, _REMEDY)
    for name, (dtype, shape) in layout.items():
        if name not in found:
            raise InputError(f"{file}: {name}", "is missing", _REMEDY)
        expected = SAFETENSORS_NAMES[dtype], shape
        if found[name] != expected:
            shown = [f"{kind}{list(size)}" for kind, size in (found[name], expected)]
            raise InputError(
                f"{file}: {name}", f"is {shown[0]}, and config.json needs {shown[1]}", _REMEDY
            )
    for name in found.keys() - layout.keys():
        raise InputError(f"{file}: {name}", "does not belong to this model", _REMEDY)


def read_weights(
    contents: Contents, quantized: QuantizedCheckpoint
) -> Iterator[tuple[str, str, QuantizedTensor | Tensor]]:
    """Every weight with the names and in the order of rows of `quantized`: name, place, and codes
    and scales or floats.

    Raises InputError at the end, with the first name, for what codes and scales do not tell:
    biases that are not the multiple of their scales, repeated scales that differ, and norms that
    the checkpoint does not have and that are not ones.
    """
    model, problems = as_equivalent(quantized), list[tuple[str, str]]()
    for key, value in asdict(model.config).items():
        if (found := getattr(contents.config, key)) != value:
            subject = f"{contents.path / CONFIG}: {key}"
            raise InputError(subject, f"is {short(found)}, and the model's is {short(value)}")
    for name, source in model.model.sources.items():
        affine = contents.stored[name]
        if source.name is None:
            weight = contents.tensor(name)
            if not torch.equal(weight.float(), torch.ones(weight.shape)):
                problems.append((name, "is not all ones, and the checkpoint has no such weight"))
            continue
        if affine is None:
            found_weight: QuantizedTensor | Tensor = contents.tensor(name)
        else:
            scales = contents.tensor(part(name, "scales"))
            biases = contents.tensor(part(name, "biases"))
            scheme = quantized.schemes[source.name]
            if scheme == FLOAT:
                raise InputError(source.name, f"is stored with {affine.bits} bits, not in float")
            found_weight, repeated = unpack(
                source.name, contents.tensor(name), scales, affine, scheme
            )
            wrong = wrong_biases(scales, biases, affine)
            problems += [(source.name, problem) for problem in (repeated, wrong) if problem]
        yield source.name, name, model.restore(name, found_weight)
    for name, problem in problems:
        more = len({subject for subject, _ in problems}) - 1
        raise InputError(name, problem + (f"; {more} more weights have such" if more else ""))


def differences(found: Path, expected: Path, files: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """How the config.json, the tokenizer_config.json and the tensors of a folder differ from those
    of another. Raises InputError for a folder that cannot be read."""
    for name in (CONFIG, TOKENIZER):
        if name in files:
            one, other = read_json(found / name), read_json(expected / name)
            yield from _comparison.differences(one, other, name)
    one, other = _header(found / FILE_NAME), _header(expected / FILE_NAME)
    yield from _comparison.differences(one, other, FILE_NAME)
    for name in other["tensors"]:
        if one["tensors"].get(name) == other["tensors"][name]:
            tensors = (_numpy(_read(path / FILE_NAME, name)) for path in (found, expected))
            if problem := _comparison.array_difference(*tensors):
                yield f"{FILE_NAME}: {name}", problem


def _header(file: Path) -> dict[str, Any]:
    """Types, shapes and metadata of a file as plain data."""
    tensors = {name: [kind, list(shape)] for name, (kind, shape) in read_header(file).items()}
    with safe_open(file, framework="pt") as opened:
        return {"tensors": tensors, "metadata": opened.metadata()}


def _read(file: Path, name: str) -> Tensor:
    try:
        with safe_open(file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
            return tensor
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: {name}", f"cannot be read ({error})", _REMEDY) from error


def _numpy(tensor: Tensor) -> np.ndarray:
    """Its values; numpy has no bfloat16, and a float32 holds each of its values."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
