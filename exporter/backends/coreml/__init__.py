"""Core ML: a stateful package for iOS 18 and macOS 15, codes and scales untouched.

    mobilellm lower build/nano-int4 --target coreml -o build/nano-coreml

`graph` says what is in the program, `package` knows the files, `lowering` makes them. Where there
is no Core ML, `interpreter` runs the package. `inspection` shows any package.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from exporter import backends
from exporter.backends import Artifact, Inspection, Prediction, Runner, check_context
from exporter.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from exporter.model.decoder import ModelConfig
    from exporter.quantization.activations import Rounding
    from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint
    from exporter.quantization.schemes import QuantizedTensor, Scheme

EXTRA, TOOLKIT = "coreml", ("coremltools",)
FILE_NAME = "model.mlpackage"
#: The files of a package.
MANIFEST = "Manifest.json"
MODEL = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"
FILES = tuple(f"{FILE_NAME}/{name}" for name in (MANIFEST, MODEL, WEIGHTS))
SUFFIX = ".mlpackage"


class Target(backends.Target):
    """An .mlpackage for iOS 18 and macOS 15; prompts are read in chunks of `prefill` tokens.

    `activations: float32` is for models whose activations float16 cannot hold; the Neural Engine
    does not run it. `output: token` finds the likeliest token inside the program. `author` and
    `license` are shown in Xcode.
    """

    target: Literal["coreml"] = "coreml"
    prefill: int = 128
    activations: Literal["float16", "float32"] = "float16"
    output: Literal["logits", "token"] = "logits"
    author: str = ""
    license: str = ""


def check(config: "ModelConfig", schemes: "Mapping[str, Scheme]", target: Target) -> None:
    """Refuse what the program cannot be. Raises InputError."""
    check_context(config, target)
    if not 2 <= target.prefill <= target.max_context:
        raise InputError(
            "prefill",
            f"{target.prefill} tokens are not between 2 and max_context ({target.max_context})",
            "128 suits most phones",
        )


def predict(config: "ModelConfig", schemes: "Mapping[str, Scheme]", target: Target) -> Prediction:
    """The file within two per cent. Memory is the sum of file, cache and activations, and was not
    measured, for want of a device."""
    from exporter.backends.coreml import size

    return size.predict(config, schemes, target)


def packages(target: Target) -> tuple[str, ...]:
    """The distributions whose versions decide the bytes."""
    return "coremltools", "numpy"


def portable(target: Target) -> bool:
    """Core ML has all operators or none."""
    return False


def integers(config: "ModelConfig", schemes: "Mapping[str, Scheme]", target: Target) -> bool:
    """Core ML reads every quantized weight as codes and scales."""
    return True


def rounding(schemes: "Mapping[str, Scheme]", target: Target, prompt: int) -> "Rounding | None":
    """Activations are float16, if not asked to be wider."""
    from exporter.quantization.activations import round_to_half

    return round_to_half if target.activations == "float16" else None


def largest_activation(target: Target, which: str) -> float | None:
    """What overflows in float16, which the cache always is."""
    from exporter.quantization.activations import LARGEST_HALF

    half = target.activations == "float16" or which in ("keys", "values")
    return LARGEST_HALF if half else None


def lower(quantized: "QuantizedCheckpoint", target: Target, out: Path) -> Artifact:
    """Write `out`/model.mlpackage."""
    from exporter.backends.coreml import lowering

    check(quantized.config, quantized.schemes, target)
    return lowering.lower(quantized, target, out)


def load(artifact: Artifact) -> Runner:
    """The artifact in Core ML on a Mac, in the reference interpreter elsewhere. One that gives
    tokens is interpreted everywhere: Core ML shows no logits of it."""
    from exporter.backends.coreml import lowering

    return lowering.load(artifact)


def cross_check(artifact: Artifact) -> Runner | None:
    """What a Mac runs in Core ML, in the reference interpreter."""
    from exporter.backends.coreml import lowering

    return lowering.cross_check(artifact)


def weights(
    artifact: Artifact, quantized: "QuantizedCheckpoint"
) -> "Iterator[tuple[str, str, QuantizedTensor | Tensor]]":
    """Every weight of every function: name, its place, codes and scales."""
    from exporter.backends.coreml import lowering

    return lowering.weights(artifact, quantized)


def inspect(path: Path) -> Inspection:
    """What is in a package, also one that was made elsewhere. Raises InputError."""
    from exporter.backends.coreml import inspection

    return inspection.shown(inspection.inspect_package(path))
