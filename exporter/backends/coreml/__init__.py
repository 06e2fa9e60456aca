"""Core ML: a stateful package for iOS 18 and macOS 15, codes and scales untouched.

    mobilellm lower build/nano-int4 --target coreml -o build/nano-coreml

`program` builds the program with `graph`, `neural_engine` or `language_model` and `constants`,
`package` reads and writes the files of a package, and `lowering` makes an artifact, which `running`
runs. `interpreter` runs a package without Core ML, with `operators`. `inspection` shows the content
of any package, and `comparison` compares two.
"""

import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from exporter import backends
from exporter.backends import Artifact, Inspection, Prediction, Runner, check_context
from exporter.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from exporter.model.config import ModelConfig
    from exporter.quantization.activations import Rounding
    from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint
    from exporter.quantization.schemes import QuantizedTensor, Scheme

EXTRA, TOOLKIT = "coreml", ("coremltools",)
RUNTIME_EXTRA, RUNTIME = EXTRA, TOOLKIT
FILE_NAME = "model.mlpackage"
#: The files of a package.
MANIFEST = "Manifest.json"
MODEL = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"
PACKAGE_FILES = tuple(f"{FILE_NAME}/{name}" for name in (MANIFEST, MODEL, WEIGHTS))
#: With `interface: language_model`, the tokenizer's configuration as swift-transformers reads it.
TOKENIZER = "tokenizer_config.json"
FILES = (*PACKAGE_FILES, TOKENIZER)
SUFFIX = ".mlpackage"

#: The length of the cache is a multiple of this (apple/coremltools 2631).
STATE_MULTIPLE = 32
#: The longest chunk for the Neural Engine (apple/coremltools 2553, Anemll/Anemll 27).
LONGEST_PREFILL = 32


class Target(backends.Target):
    """An .mlpackage for iOS 18 and macOS 15. It reads prompts in chunks of `prefill` tokens.

    `compute: neural_engine` is a form for the Neural Engine, which was not run on hardware.
    `activations: float32` is for models whose activations overflow in float16; the Neural Engine
    does not run it. `output: token` gives the most likely token instead of the logits. Xcode shows
    `author` and `license`.

    `interface: language_model` is one function as `LanguageModel` of swift-transformers calls it.
    It reads any number of tokens; `prefill` is how many our own runner reads at once. `hub_id` is
    the model on the Hugging Face Hub whose tokenizer an app gets that brings none.
    """

    target: Literal["coreml"] = "coreml"
    interface: Literal["functions", "language_model"] = "functions"
    compute: Literal["cpu_and_gpu", "neural_engine"] = "cpu_and_gpu"
    prefill: int = 128
    activations: Literal["float16", "float32"] = "float16"
    output: Literal["logits", "token"] = "logits"
    hub_id: str = ""
    author: str = ""
    license: str = ""


def check(config: "ModelConfig", schemes: "Mapping[str, Scheme]", target: Target) -> None:
    """Raise InputError for a context, chunk size or scheme that the program cannot have."""
    from exporter.backends._storage import check_stored
    from exporter.backends.coreml.schemes import stores, stores_for_neural_engine

    check_cache(config, target)
    if not 2 <= target.prefill <= target.max_context:
        raise InputError(
            "prefill",
            f"{target.prefill} tokens are not between 2 and max_context ({target.max_context})",
            "128 suits most phones",
        )
    _check_interface(target)
    if target.compute == "neural_engine":
        _check_neural_engine(config, target)
        check_stored(config, schemes, stores_for_neural_engine)
    check_stored(config, schemes, stores)


def check_cache(config: "ModelConfig", target: backends.Target) -> None:
    """Raise InputError for a context that the model does not support, or no multiple of 32.

    A state of another size fails on the Neural Engine, which an app may choose for any package
    (apple/coremltools 2631). The context is not rounded: `max_context` is that of every target.
    """
    check_context(config, target)
    if target.max_context % STATE_MULTIPLE:
        below = target.max_context // STATE_MULTIPLE * STATE_MULTIPLE
        above = below + STATE_MULTIPLE
        choices = [size for size in (below, above) if 0 < size <= config.max_position_embeddings]
        raise InputError(
            "max_context",
            f"{target.max_context} is not a multiple of {STATE_MULTIPLE}, as Core ML's states need",
            f"Set it to {' or '.join(map(str, choices))}" if choices else "Use another target",
        )


def _check_interface(target: Target) -> None:
    """Raise InputError for options that the interface does not have."""
    if target.interface == "functions":
        if target.hub_id:
            raise InputError(
                "hub_id",
                "is read by swift-transformers only",
                "Leave it out, or set interface to language_model",
            )
        return
    if target.compute == "neural_engine":
        raise InputError(
            "compute",
            "neural_engine has its own two functions: it takes chunks of a fixed size only",
            "Set interface to functions, or compute to cpu_and_gpu",
        )
    if target.output != "logits":
        raise InputError(
            "output",
            "swift-transformers reads logits",
            "Set output to logits, or interface to functions",
        )


def _check_neural_engine(config: "ModelConfig", target: Target) -> None:
    """Raise InputError for what the form for the Neural Engine cannot have."""
    if target.activations != "float16":
        raise InputError(
            "activations",
            "the Neural Engine computes in float16 only",
            "Set activations to float16, or compute to cpu_and_gpu",
        )
    if target.prefill > LONGEST_PREFILL:
        raise InputError(
            "prefill",
            f"{target.prefill} tokens are more than the {LONGEST_PREFILL} that the Neural Engine "
            "takes at once",
            f"Set prefill to {LONGEST_PREFILL}",
        )
    if config.head_dim % STATE_MULTIPLE:
        raise InputError(
            "head_dim",
            f"{config.head_dim} is not a multiple of {STATE_MULTIPLE}, which states need on the "
            "Neural Engine",
            "Set compute to cpu_and_gpu",
        )


def check_folder(folder: Path, target: Target) -> None:
    """The files of a model folder are copied as they are, whatever they hold."""


def predict(config: "ModelConfig", schemes: "Mapping[str, Scheme]", target: Target) -> Prediction:
    """The file size within 2 %. Memory is the sum of file, cache and activations.

    The memory was not compared with a device, since none was available.
    """
    from exporter.backends.coreml import size

    return size.predict(config, schemes, target)


def usage(target: Target) -> str:
    """What the Swift sample or swift-transformers does; the package was not run on a Mac."""
    if target.interface == "language_model":
        return _LANGUAGE_MODEL_USAGE.format(file=FILE_NAME, context=target.max_context)
    units = "cpuAndNeuralEngine" if target.compute == "neural_engine" else "cpuAndGPU"
    return (
        f"An app for iOS 18 or macOS 15 loads `{FILE_NAME}` once for each of its functions, "
        f"`prefill` ({target.prefill} tokens a call) and `decode` (one token), with `.{units}`, "
        "and gives both the same `MLState`. `examples/ios/Decoder.swift` of mobilellm-exporter has "
        "the whole code. This was not run on a Mac or an iPhone."
    )


_LANGUAGE_MODEL_USAGE = """\
An app for iOS 18 or macOS 15 runs `{file}` with `LanguageModel` of swift-transformers:

```swift
let tokenizer = try await AutoTokenizer.from(modelFolder: folder)
let compiled = try await MLModel.compileModel(at: folder.appending(path: "{file}"))
let model = try LanguageModel.loadCompiled(url: compiled, tokenizer: tokenizer)
var config = model.defaultGenerationConfig
config.maxNewTokens = 100
let text = try await model.generate(config: config, prompt: prompt)
```

`folder` is this folder. Prompt and answer have at most {context} tokens together: more end the app.
This was not run on a Mac or an iPhone."""


def main_file(files: Collection[str]) -> str:
    """The file, or the folder, that a runtime opens."""
    return FILE_NAME


def packages(target: Target) -> tuple[str, ...]:
    """The distributions whose versions determine the bytes of the artifact."""
    return "coremltools", "numpy"


def native(target: Target) -> bool:
    """False: the native runner runs only ExecuTorch programs."""
    return False


def interpreted(target: Target) -> bool:
    """Whether `load` runs the artifact in the reference interpreter: unless this is a Mac and the
    artifact gives logits."""
    return sys.platform != "darwin" or target.output != "logits"


def integers(config: "ModelConfig", schemes: "Mapping[str, Scheme]", target: Target) -> bool:
    """Yes: Core ML reads every quantized weight as codes and scales."""
    return True


def rounding(schemes: "Mapping[str, Scheme]", target: Target, prompt: int) -> "Rounding | None":
    """Activations are rounded to float16, unless the target asks for float32."""
    from exporter.quantization.activations import round_to_half

    return round_to_half if target.activations == "float16" else None


def cache_rounding(target: Target) -> None:
    """None: keys and values are float16, whose error is below the limits of float activations."""


def largest_activation(target: Target, which: str) -> float | None:
    """The largest float16, for float16 activations and for the cache, which is always float16."""
    from exporter.quantization.activations import LARGEST_HALF

    half = target.activations == "float16" or which in ("keys", "values")
    return LARGEST_HALF if half else None


def lower(quantized: "QuantizedCheckpoint", target: Target, out: Path) -> Artifact:
    """Write `out`/model.mlpackage."""
    from exporter.backends.coreml import lowering

    check(quantized.config, quantized.schemes, target)
    return lowering.lower(quantized, target, out)


def load(artifact: Artifact, variant: str = "") -> Runner:
    """The artifact in Core ML on a Mac, and in the reference interpreter elsewhere or as `variant`.

    With `output: token` it runs in the interpreter everywhere, since Core ML gives no logits then.
    """
    from exporter.backends.coreml import running

    return running.load(artifact, variant)


def cross_checks(artifact: Artifact) -> tuple[str, ...]:
    """The reference interpreter, if `load` runs Core ML itself; and, if activations are float16,
    the interpreter without float32."""
    from exporter.backends.coreml import running

    return running.cross_checks(artifact)


def weights(
    artifact: Artifact, quantized: "QuantizedCheckpoint"
) -> "Iterator[tuple[str, str, QuantizedTensor | Tensor]]":
    """Every weight of every function: name, place, codes and scales or floats."""
    from exporter.backends.coreml import lowering

    return lowering.weights(artifact, quantized)


def differences(found: Artifact, expected: Artifact) -> Iterator[tuple[str, str]]:
    """How the package of `found` differs from that of `expected`: place, and what differs there.

    See `comparison.package_differences` for what is left out. Raises InputError for a package that
    cannot be read.
    """
    from exporter.backends.coreml.comparison import package_differences
    from exporter.backends.coreml.package import open_package

    packages = (open_package(artifact.path / FILE_NAME) for artifact in (found, expected))
    return package_differences(*packages)


def inspect(path: Path) -> Inspection:
    """The content of a .mlpackage from any tool. Raises InputError."""
    from exporter.backends.coreml import inspection

    return inspection.describe(inspection.inspect_package(path))
