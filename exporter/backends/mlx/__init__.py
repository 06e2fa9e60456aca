"""MLX: a folder for Apple's computers and phones, codes and scales untouched.

    mobilellm lower build/nano-int4 --target mlx -o build/nano-mlx
    mlx_lm.generate --model build/nano-mlx --prompt "Ada has 12 eggs. Ada sells 5. How many?"

The folder is one that mlx-lm and MLX Swift open as it is. A family that they do not know is written
as its equivalent (`exporter.model.equivalent`). `layout` says which tensors the file has, and packs
and unpacks them; `lowering` writes the folder; `contents` reads it again; `running` runs it in MLX.

MLX's codes are unsigned, and a weight is code * scale + bias. The bias of a symmetric scheme is -8
or -128 times the scale, which is exact. It costs as many bytes as the scale.
"""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from exporter import backends
from exporter.backends import Artifact, Prediction, Runner, check_context

if TYPE_CHECKING:
    from torch import Tensor

    from exporter.model.config import ModelConfig
    from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint
    from exporter.quantization.schemes import QuantizedTensor, Scheme

EXTRA, TOOLKIT = "mlx", ()
RUNTIME_EXTRA, RUNTIME = EXTRA, ("mlx", "mlx_lm")
FILE_NAME, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer_config.json"
FILES = (FILE_NAME, CONFIG, TOKENIZER)
SUFFIX = ""


class Target(backends.Target):
    """A folder for mlx-lm and MLX Swift. `activations` is the type of scales, of biases and of
    weights that are left in float, and so the one that MLX computes in."""

    target: Literal["mlx"] = "mlx"
    activations: Literal["float16", "bfloat16", "float32"] = "float16"


def check(config: "ModelConfig", schemes: "Mapping[str, Scheme]", target: Target) -> None:
    """Raise InputError for rows that no group of MLX divides."""
    from exporter.backends._storage import check_stored
    from exporter.backends.mlx.layout import stores

    check_context(config, target)
    check_stored(config, schemes, stores)


def check_folder(folder: Path, target: Target) -> None:
    """Nothing: mlx-lm reads any tokenizer that transformers reads."""


def predict(config: "ModelConfig", schemes: "Mapping[str, Scheme]", target: Target) -> Prediction:
    """The size of the weight file within 0.1 %. The memory was not compared with a Mac."""
    from exporter.backends.mlx import layout

    return layout.predict(config, schemes, target.activations, target.max_context)


def main_file(files: Collection[str]) -> str:
    """The file of the weights; runtimes open the folder that it is in."""
    return FILE_NAME


def packages(target: Target) -> tuple[str, ...]:
    """The distributions whose versions determine the bytes of the artifact."""
    return ("torch",)


_USAGE = """\
mlx-lm runs the folder as it is, on a Mac and on Linux:

```sh
pip install mlx-lm  # on Linux: pip install mlx-lm 'mlx[cpu]'
mlx_lm.generate --model . --prompt "..." --max-tokens 256
mlx_lm.server --model . --port 8080  # an HTTP server with OpenAI's interface
```

MLX Swift (`mlx-swift-lm` 3, for apps on a Mac, an iPhone or an iPad) opens the same folder:

```swift
import HuggingFace
import MLXHuggingFace
import MLXLLM
import MLXLMCommon
import Tokenizers

let folder = URL(filePath: "...")  // this folder
let model = try await loadModel(from: folder, using: #huggingFaceTokenizerLoader())
print(try await ChatSession(model).respond(to: "..."))
```

mlx-lm was run on Linux, on the CPU only. MLX Swift was not run, and no Mac or iPhone was tried."""
_SLOW = """\
MLX computes in {kind} with this folder. That is slow on a CPU of Intel or AMD, where it also \
rounds sums that a GPU does not round: for these, lower the model with `activations=float32`."""


def usage(target: Target) -> str:
    """mlx-lm's commands, and MLX Swift."""
    if target.activations == "float32":
        return _USAGE
    return f"{_USAGE}\n\n{_SLOW.format(kind=target.activations)}"


def native(target: Target) -> bool:
    """False: the native runner runs only ExecuTorch programs."""
    return False


def integers(config: "ModelConfig", schemes: "Mapping[str, Scheme]", target: Target) -> bool:
    """No: `quantized_matmul` multiplies floats with codes that it dequantizes in registers."""
    return False


def interpreted(target: Target) -> bool:
    """No: MLX itself runs here, on the CPU and in float32 (see `running`)."""
    return False


def rounding(schemes: "Mapping[str, Scheme]", target: Target, prompt: int) -> None:
    """None: `load` computes in float32, whatever the target's type."""


def cache_rounding(target: Target) -> None:
    """None: `load` computes in float32."""


def largest_activation(target: Target, which: str) -> float | None:
    """The largest float16 for float16; the other types have the range of float32."""
    from exporter.quantization.activations import LARGEST_HALF

    return LARGEST_HALF if target.activations == "float16" else None


def lower(quantized: "QuantizedCheckpoint", target: Target, out: Path) -> Artifact:
    """Write model.safetensors, config.json and tokenizer_config.json.

    Raises InputError for a weight whose biases or floats the target's type does not hold exactly.
    """
    from exporter.backends.mlx import lowering

    check(quantized.config, quantized.schemes, target)
    return lowering.lower(quantized, target, out)


def load(artifact: Artifact, variant: str = "") -> Runner:
    """The artifact in MLX on the CPU, in float32."""
    from exporter.backends.mlx import running

    return running.load(artifact.path, artifact.target.max_context)


def cross_checks(artifact: Artifact) -> tuple[str, ...]:
    """None: `load` runs MLX itself on every machine."""
    return ()


def weights(
    artifact: Artifact, quantized: "QuantizedCheckpoint"
) -> "Iterator[tuple[str, str, QuantizedTensor | Tensor]]":
    """Every weight decoded from the file as its config.json says: name, place, codes and scales."""
    from exporter.backends.mlx import contents

    return contents.read_weights(contents.open_contents(artifact.path), quantized)


def differences(found: Artifact, expected: Artifact) -> "Iterator[tuple[str, str]]":
    """How the three files of `found` differ from those of `expected`.

    Left out are the order and the places of tensors in the file.
    """
    from exporter.backends.mlx import contents

    return contents.differences(found.path, expected.path, expected.files)
