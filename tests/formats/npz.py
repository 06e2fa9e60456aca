"""A format of one module, for a test: codes and scales as numpy arrays, which torch runs."""

import json
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from exporter import backends
from exporter.backends import (
    Artifact,
    Inspection,
    Prediction,
    Runner,
    _comparison,
    check_context,
)
from exporter.errors import InputError
from exporter.files import replacing
from exporter.inference.reference import ReferenceRunner
from exporter.model.config import ModelConfig, parse_config
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint
from exporter.quantization.schemes import FLOAT, QuantizedTensor, Scheme

EXTRA, TOOLKIT = RUNTIME_EXTRA, RUNTIME = "npz", ("numpy",)
FILE_NAME = "model.npz"
FILES = (FILE_NAME,)
SUFFIX = ".npz"


class Target(backends.Target):
    """An .npz of int8 codes and float32 scales; `threads` is an option like any other."""

    target: Literal["npz"] = "npz"
    threads: int = 1


def check(config: ModelConfig, schemes: Mapping[str, Scheme], target: Target) -> None:
    check_context(config, target)
    if target.threads < 1:
        raise InputError("threads", f"{target.threads} is too few", "Give 1 or more")


def check_folder(folder: Path, target: Target) -> None:
    path = folder / "chat_template.jinja"
    if path.exists():
        raise InputError(path, "has no place in an .npz", "Remove it")


def predict(config: ModelConfig, schemes: Mapping[str, Scheme], target: Target) -> Prediction:
    file = 0
    for name, shape in config.parameter_shapes().items():
        scheme, values = schemes[name], math.prod(shape)
        file += 4 * values if scheme == FLOAT else values + 4 * math.prod(scheme.scale_shape(shape))
    cache = config.kv_cache_bytes(target.max_context, bytes_per_value=4)
    return Prediction(file, cache, 2 * file + cache)


def lower(quantized: QuantizedCheckpoint, target: Target, out: Path) -> Artifact:
    arrays = {"config": np.frombuffer((quantized.path / "config.json").read_bytes(), np.uint8)}
    for name in quantized.schemes:
        weight = quantized.read(name)
        if isinstance(weight, QuantizedTensor):
            arrays |= {
                f"{name}:codes": weight.codes.numpy(),
                f"{name}:scales": weight.scales.numpy(),
            }
        else:
            arrays[name] = weight.float().numpy()
    with replacing(out / FILE_NAME) as file:
        np.savez(file, **arrays)
    return Artifact(out, target, FILES)


@dataclass(frozen=True)
class Stored:
    """The weights of a file."""

    config: ModelConfig
    arrays: Mapping[str, np.ndarray]

    def float_weight(self, name: str) -> Tensor:
        if name in self.arrays:
            return torch.from_numpy(self.arrays[name])
        codes, scales = (torch.from_numpy(self.arrays[f"{name}:{p}"]) for p in ("codes", "scales"))
        return (codes.unflatten(1, (scales.shape[1], -1)) * scales[:, :, None]).flatten(1)


def read(path: Path) -> Stored:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, BadZipFile) as error:
        raise InputError(path, f"cannot be read ({error})") from error
    return Stored(parse_config(json.loads(arrays.pop("config").tobytes()), path), arrays)


def load(artifact: Artifact, variant: str = "") -> Runner:
    return ReferenceRunner(read(artifact.path / FILE_NAME), artifact.target.max_context)


def cross_checks(artifact: Artifact) -> tuple[str, ...]:
    return ()


def weights(
    artifact: Artifact, quantized: QuantizedCheckpoint
) -> Iterator[tuple[str, str, QuantizedTensor | Tensor]]:
    arrays = read(artifact.path / FILE_NAME).arrays
    for name, scheme in quantized.schemes.items():
        if scheme == FLOAT:
            yield name, "array", torch.from_numpy(arrays[name])
            continue
        codes, scales = (torch.from_numpy(arrays[f"{name}:{p}"]) for p in ("codes", "scales"))
        yield name, "array", QuantizedTensor(codes, scales, scheme)


def differences(found: Artifact, expected: Artifact) -> Iterator[tuple[str, str]]:
    stored = [read(one.path / FILE_NAME) for one in (found, expected)]
    yield from _comparison.differences(*(one.arrays for one in stored))
    if stored[0].config != stored[1].config:
        yield "config", "is another model's"


def inspect(path: Path) -> Inspection:
    shapes = {name: list(array.shape) for name, array in read(path).arrays.items()}
    return Inspection({"arrays": shapes}, str(path), {"arrays": str(len(shapes))})


def rounding(schemes: Mapping[str, Scheme], target: Target, prompt: int) -> None:
    return None


def cache_rounding(target: Target) -> None:
    return None


def largest_activation(target: Target, which: str) -> None:
    return None


def native(target: Target) -> bool:
    return True


def integers(config: ModelConfig, schemes: Mapping[str, Scheme], target: Target) -> bool:
    return False


def usage(target: Target) -> str:
    return f"numpy reads `{FILE_NAME}`."


def interpreted(target: Target) -> bool:
    return False


def main_file(files: Collection[str]) -> str:
    return FILE_NAME


def packages(target: Target) -> tuple[str, ...]:
    return ("numpy",)
