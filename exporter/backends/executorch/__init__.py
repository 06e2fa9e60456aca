"""ExecuTorch: a .pte for XNNPACK or Core ML, codes and scales untouched.

    mobilellm lower build/nano-int4 --target executorch -o build/nano

The program is small: an embedding, and between two attentions one XNNPACK call that holds all
the rest of a layer. `segments` says what is in such a call, `graph` writes it down, `program` puts
the program around it, `file` knows the bytes, `lowering` makes the file. With ``delegate=coreml``
it is one call, see `coreml_delegate`.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from exporter import backends
from exporter.backends import Artifact, Prediction, Runner, backend, check_context, coreml
from exporter.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from exporter.model.config import ModelConfig
    from exporter.quantization.activations import Rounding
    from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint
    from exporter.quantization.schemes import QuantizedTensor, Scheme

EXTRA, TOOLKIT = "executorch", ("executorch", "torchao")
FILE_NAME = "model.pte"
FILES = (FILE_NAME,)
SUFFIX = ""


class Target(backends.Target):
    """A .pte for XNNPACK, or with a Core ML package inside for iOS 18 and macOS 15.

    XNNPACK: ``custom_sdpa`` is for the official runners, ``portable`` for any. Core ML: attention
    is its own, `activations: float16` is what the Neural Engine runs, and a prompt is read token
    by token (`coreml` as a target of its own reads it in chunks).
    """

    by_default: ClassVar[bool] = True

    target: Literal["executorch"] = "executorch"
    delegate: Literal["xnnpack", "coreml"] = "xnnpack"
    attention: Literal["custom_sdpa", "portable"] = "custom_sdpa"
    activations: Literal["float32", "float16"] = "float32"


def embedded(target: Target) -> coreml.Target:
    """What the package inside the .pte is made for: one token a call."""
    return coreml.Target(max_context=target.max_context, prefill=1, activations=target.activations)


def check(config: "ModelConfig", schemes: "Mapping[str, Scheme]", target: Target) -> None:
    """Refuse what the delegate or the model cannot do. Raises InputError."""
    from exporter.backends._storage import check_stored
    from exporter.backends.coreml.schemes import stores as stored_by_coreml
    from exporter.backends.executorch.schemes import stores

    check_context(config, target)
    if target.delegate == "coreml":
        if target.attention != "custom_sdpa":
            raise InputError(
                "attention",
                f"{target.attention} is a choice for XNNPACK; the Core ML delegate attends itself",
                "Leave it out",
            )
        backend("coreml")
        check_stored(config, schemes, stored_by_coreml)
        return
    if target.activations != "float32":
        raise InputError(
            "activations",
            f"XNNPACK's are float32 and int8, not {target.activations}",
            "Leave it out, or set delegate to coreml",
        )
    check_stored(config, schemes, partial(stores, config=config))


def predict(config: "ModelConfig", schemes: "Mapping[str, Scheme]", target: Target) -> Prediction:
    """The file within one per cent, two for the smallest; memory within a tenth on x86-64."""
    from exporter.backends.executorch import size

    if target.delegate == "coreml":
        return coreml.predict(config, schemes, embedded(target))
    return size.predict(config, schemes, target)


def packages(target: Target) -> tuple[str, ...]:
    """The distributions whose versions decide the bytes."""
    own = ("executorch", "torch")
    return own if target.delegate == "xnnpack" else (*own, "coremltools", "numpy")


def portable(target: Target) -> bool:
    """``custom_sdpa`` is no core operator."""
    return target.attention == "portable"


def integers(config: "ModelConfig", schemes: "Mapping[str, Scheme]", target: Target) -> bool:
    """XNNPACK multiplies codes with activations in int8."""
    return True


def rounding(schemes: "Mapping[str, Scheme]", target: Target, prompt: int) -> "Rounding | None":
    """XNNPACK's dynamic activations: int8, one scale a row. Core ML's own in its package."""
    from exporter.quantization.activations import round_rows_to_int8

    if target.delegate == "coreml":
        return coreml.rounding(schemes, embedded(target), prompt)
    return round_rows_to_int8


def largest_activation(target: Target, which: str) -> float | None:
    """Activations are float32 in XNNPACK."""
    if target.delegate == "coreml":
        return coreml.largest_activation(embedded(target), which)
    return None


def lower(quantized: "QuantizedCheckpoint", target: Target, out: Path) -> Artifact:
    """Write `out`/model.pte."""
    from exporter.backends.executorch import lowering

    check(quantized.config, quantized.schemes, target)
    return lowering.lower(quantized, target, out)


def load(artifact: Artifact) -> Runner:
    """The artifact ready to run. The whole file is read, so that a short one is refused.

    The Core ML delegate runs on a Mac only (not tried yet, for want of one), token by token;
    elsewhere its package does, in the reference interpreter.
    """
    from exporter.backends.executorch import lowering

    return lowering.load(artifact)


def cross_check(artifact: Artifact) -> Runner | None:
    """The package that a Mac runs, in the reference interpreter. There is none of XNNPACK."""
    from exporter.backends.executorch import lowering

    return lowering.cross_check(artifact)


def weights(
    artifact: Artifact, quantized: "QuantizedCheckpoint"
) -> "Iterator[tuple[str, str, QuantizedTensor | Tensor]]":
    """Every weight decoded out of the .pte: name, place in the file, codes and scales."""
    from exporter.backends.executorch import lowering

    return lowering.weights(artifact, quantized)
