"""ExecuTorch: a .pte for XNNPACK or Core ML, codes and scales untouched.

    mobilellm lower build/nano-int4 --target executorch -o build/nano

The program consists of the embedding, the attentions, and one XNNPACK call between two attentions
for everything else. `segments` decides which operations are in each call, `graph` serializes a
call, `program` is the program around the calls, `file` stores the embedding once, and `lowering`
makes the artifact, which `runtime` runs. `contents` reads a .pte, by its schemas alone: `decoding`
decodes the weights that it finds there, and `comparison` compares two programs. With
``delegate=coreml`` the program is one call: see `coreml_delegate`.
"""

import sys
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from exporter import backends
from exporter.backends import Artifact, Prediction, Runner, backend, check_context, coreml
from exporter.backends._target import Context
from exporter.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from exporter.model.config import ModelConfig
    from exporter.quantization.activations import CacheRounding, Rounding
    from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint
    from exporter.quantization.schemes import QuantizedTensor, Scheme

EXTRA, TOOLKIT = "executorch", ("executorch", "torchao")
RUNTIME_EXTRA, RUNTIME = EXTRA, TOOLKIT
FILE_NAME = "model.pte"
FILES = (FILE_NAME,)
#: Each row of logits takes 4 bytes for each token of the vocabulary, in every runner.
MOST_LOGITS = 64
SUFFIX = ""
#: Tokens that a call reads unless the target says otherwise.
LONGEST_CALL = 512


class Target(backends.Target):
    """A .pte for XNNPACK, or one with a Core ML package inside for iOS 18 and macOS 15.

    XNNPACK: ``attention: custom_sdpa`` needs the custom operators that the official runners and
    our native runner have; ``portable`` runs in any runner. ``kv_cache: int8``, for ``custom_sdpa``
    only, keeps keys and values in int8, with a scale and a zero point per token and head. A call
    reads at most `prefill` tokens, for which the program plans its memory; runners read longer
    prompts in several calls. It gives the `logits` of its last so many positions: a speculative
    pair needs more than one. Core ML: the delegate computes attention, the Neural Engine needs
    `activations: float16`, and prompts are read token by token (the target `coreml` reads them in
    chunks).
    """

    by_default: ClassVar[bool] = True

    target: Literal["executorch"] = "executorch"
    delegate: Literal["xnnpack", "coreml"] = "xnnpack"
    attention: Literal["custom_sdpa", "portable"] = "custom_sdpa"
    activations: Literal["float32", "float16"] = "float32"
    kv_cache: Literal["float", "int8"] = "float"
    prefill: Context = LONGEST_CALL
    logits: int = 1


def longest_call(target: Target) -> int:
    """The most tokens that a call of the program for XNNPACK reads."""
    return min(target.prefill, target.max_context)


def embedded(target: Target) -> coreml.Target:
    """The target of the package inside the .pte, which reads one token per call."""
    return coreml.Target(max_context=target.max_context, prefill=1, activations=target.activations)


def check(config: "ModelConfig", schemes: "Mapping[str, Scheme]", target: Target) -> None:
    """Raise InputError for options or schemes that the delegate does not support."""
    from exporter.backends._storage import check_stored
    from exporter.backends.coreml.schemes import stores as stored_by_coreml
    from exporter.backends.executorch.schemes import stores

    check_context(config, target)
    if target.kv_cache == "int8" and not _custom_operators(target):
        raise InputError(
            "kv_cache",
            "int8 needs ExecuTorch's custom operators for XNNPACK, which this target does not use",
            "Set it to float, or set delegate to xnnpack and attention to custom_sdpa",
        )
    if target.delegate == "coreml":
        if target.attention != "custom_sdpa":
            raise InputError(
                "attention",
                f"{target.attention} is an option of XNNPACK; the Core ML delegate has its own",
                "Leave it out",
            )
        if target.prefill != LONGEST_CALL:
            raise InputError(
                "prefill",
                f"{target.prefill} is an option of XNNPACK; the Core ML delegate reads one token",
                "Leave it out",
            )
        if target.logits != 1:
            raise InputError("logits", "more than one needs the delegate xnnpack", "Leave it out")
        backend("coreml")
        coreml.check_cache(config, target)
        check_stored(config, schemes, stored_by_coreml)
        return
    if target.activations != "float32":
        raise InputError(
            "activations",
            f"XNNPACK's are float32 and int8, not {target.activations}",
            "Leave it out, or set delegate to coreml",
        )
    if not 1 <= target.logits <= MOST_LOGITS:
        raise InputError(
            "logits", f"{target.logits} is not within 1..{MOST_LOGITS}", "1 is enough to generate"
        )
    if target.logits > longest_call(target):
        raise InputError(
            "logits",
            f"{target.logits} are more than the {longest_call(target)} tokens that a call reads",
            "Lower it, or raise prefill",
        )
    check_stored(config, schemes, partial(stores, config=config))


def _custom_operators(target: Target) -> bool:
    return target.delegate == "xnnpack" and target.attention == "custom_sdpa"


def check_folder(folder: Path, target: Target) -> None:
    """The files of a model folder are copied as they are, whatever they hold."""


def predict(config: "ModelConfig", schemes: "Mapping[str, Scheme]", target: Target) -> Prediction:
    """The file size within 1 % (2 % for the smallest), the memory within 10 % on x86-64."""
    from exporter.backends.executorch import size

    if target.delegate == "coreml":
        return coreml.predict(config, schemes, embedded(target))
    return size.predict(config, schemes, target)


_RUNNER = """\
```python
# pip install executorch
import executorch.extension.llm.custom_ops.custom_ops  # registers attention and its cache
import executorch.kernels.quantized  # registers the quantized embedding
from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

runner = TextLLMRunner("model.pte", "tokenizer.json")
config = GenerationConfig(echo=False, max_new_tokens=100, temperature=0.0)
runner.generate("...", config, print)  # a prompt in the form of the chat template
```"""


def usage(target: Target) -> str:
    """The official runner for ``custom_sdpa``, which Android and iOS have too; for the rest, what
    a runner needs."""
    if target.delegate == "coreml":
        return (
            "ExecuTorch's runtime with the Core ML delegate runs `model.pte` on iOS 18 and macOS "
            "15. It reads one token a call. This was not run on a Mac or an iPhone."
        )
    if target.attention == "portable":
        return (
            "Every ExecuTorch runtime with the XNNPACK delegate and the core operators runs "
            "`model.pte`: `forward(tokens, position)` gives the logits of the last token."
        )
    return (
        "ExecuTorch's official runner reads `model.pte` and `tokenizer.json` as they are, here in "
        f"Python; the same runner is in its libraries for Android and iOS:\n\n{_RUNNER}"
    )


def main_file(files: Collection[str]) -> str:
    """The file, or the folder, that a runtime opens."""
    return FILE_NAME


def packages(target: Target) -> tuple[str, ...]:
    """The distributions whose versions determine the bytes of the artifact."""
    own = ("executorch", "torch")
    return own if target.delegate == "xnnpack" else (*own, "coremltools", "numpy")


def native(target: Target) -> bool:
    """Yes, with either attention: it has kernels of its own for ``custom_sdpa``. It has no Core ML
    delegate."""
    return target.delegate == "xnnpack"


def interpreted(target: Target) -> bool:
    """Whether `load` runs the artifact in the reference interpreter: with the Core ML delegate,
    unless this is a Mac."""
    return target.delegate != "xnnpack" and sys.platform != "darwin"


def integers(config: "ModelConfig", schemes: "Mapping[str, Scheme]", target: Target) -> bool:
    """Yes: XNNPACK multiplies codes with int8 activations."""
    return True


def rounding(schemes: "Mapping[str, Scheme]", target: Target, prompt: int) -> "Rounding | None":
    """XNNPACK quantizes activations dynamically: int8, one scale per row. For Core ML see there."""
    from exporter.quantization.activations import round_rows_to_int8

    if target.delegate == "coreml":
        return coreml.rounding(schemes, embedded(target), prompt)
    return round_rows_to_int8


def cache_rounding(target: Target) -> "CacheRounding | None":
    """The queries, keys and values of ``kv_cache: int8``: one scale and zero point per head."""
    from exporter.quantization.activations import round_heads_to_int8

    return round_heads_to_int8 if target.kv_cache == "int8" else None


def largest_activation(target: Target, which: str) -> float | None:
    """None for XNNPACK, whose activations are float32."""
    if target.delegate == "coreml":
        return coreml.largest_activation(embedded(target), which)
    return None


def lower(quantized: "QuantizedCheckpoint", target: Target, out: Path) -> Artifact:
    """Write `out`/model.pte."""
    from exporter.backends.executorch import lowering

    check(quantized.config, quantized.schemes, target)
    return lowering.lower(quantized, target, out)


def load(artifact: Artifact, variant: str = "") -> Runner:
    """The artifact in ExecuTorch's runtime.

    The Core ML delegate runs on a Mac only, which is untested, since none was available. Elsewhere
    its package runs in the reference interpreter, and so it does as `variant`.
    """
    from exporter.backends.executorch import runtime

    return runtime.load(artifact, variant)


def cross_checks(artifact: Artifact) -> tuple[str, ...]:
    """Those of Core ML for its delegate. None for XNNPACK."""
    from exporter.backends.executorch import runtime

    return runtime.cross_checks(artifact)


def weights(
    artifact: Artifact, quantized: "QuantizedCheckpoint"
) -> "Iterator[tuple[str, str, QuantizedTensor | Tensor]]":
    """Every weight decoded from the .pte: name, place in the file, codes and scales or floats."""
    from exporter.backends.executorch import lowering

    return lowering.weights(artifact, quantized)


def differences(found: Artifact, expected: Artifact) -> "Iterator[tuple[str, str]]":
    """How the program in `found` differs from the one in `expected`: (place, what differs).

    Left out are the order and the places of data in the file, and the version numbers of the
    program and of XNNPACK's graphs.
    """
    from exporter.backends.executorch import lowering

    return lowering.differences(found, expected)
