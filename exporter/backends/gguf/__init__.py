"""GGUF: one file for llama.cpp and the apps that are built on it, codes and scales untouched.

    mobilellm lower build/nano-int4 --target gguf -o build/nano-gguf

int4 is stored as Q4_0 and int8 as Q8_0, in blocks of 32 with one scale each. MobileLLM-R1 goes out
as the Qwen3 that computes the same. `blocks` packs and unpacks codes and scales, `metadata`
describes the model, `vocabulary` the tokenizer, and `lowering` writes the file. `contents` reads
any file again, within limits, `decoding` decodes the weights in it, and `comparison` compares two.
`runtime` runs a file in llama.cpp.
"""

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

EXTRA, TOOLKIT = "gguf", ("gguf",)
RUNTIME_EXTRA, RUNTIME = "llama-cpp", ("llama_cpp",)
FILE_NAME = "model.gguf"
FILES = (FILE_NAME,)
SUFFIX = ".gguf"
#: For names that contain one of these, llama.cpp changes how special tokens are read, or refuses
#: the file (llama_vocab::impl::load in its src/llama-vocab.cpp).
_SPECIAL_NAMES = ("phi-3", "phi3", "modern-bert")


class Target(backends.Target):
    """A .gguf file. `floats` is the type of matrices that are left in float; norms are float32.

    `cache` is the type of the KV cache that is verified: float16 is the default of llama.cpp, whose
    attention then computes in float16 too. The file does not depend on it. `name` and `base_model`,
    an id of the hub, are written into the file if they are given.
    """

    target: Literal["gguf"] = "gguf"
    floats: Literal["float32", "float16", "bfloat16"] = "float32"
    cache: Literal["float16", "float32"] = "float16"
    name: str = ""
    base_model: str = ""


def check(config: "ModelConfig", schemes: "Mapping[str, Scheme]", target: Target) -> None:
    """Raise InputError for a context, a shape or a scheme that llama.cpp does not have."""
    from exporter.backends._storage import check_stored
    from exporter.backends.gguf.schemes import stores

    check_context(config, target)
    if config.model_type == "olmo2" and config.hidden_size != (
        config.num_attention_heads * config.head_dim
    ):
        raise InputError(
            "head_dim",
            f"{config.head_dim} is not hidden_size / num_attention_heads, as llama.cpp takes it to "
            "be for this family",
            "Choose another target",
        )
    for part in _SPECIAL_NAMES:
        if part in target.name.lower():
            problem = f"llama.cpp reads the tokenizer of a model named {part!r} in another way"
            raise InputError(f"name: {target.name}", problem, "Give another name, or none")
    check_stored(config, schemes, stores)


def check_folder(folder: Path, target: Target) -> None:
    """Raise InputError for a tokenizer that llama.cpp does not have."""
    from exporter.backends.gguf.vocabulary import check_tokenizer

    check_tokenizer(folder)


def predict(config: "ModelConfig", schemes: "Mapping[str, Scheme]", target: Target) -> Prediction:
    """The file size within 1 %, for a tokenizer of usual size; the memory within 10 % on x86-64."""
    from exporter.backends.gguf import size

    return size.predict(config, schemes, target)


_GENERATION = """\
```python
# pip install llama-cpp-python
import llama_cpp

model = llama_cpp.Llama("model.gguf", n_ctx=2048)
messages = [{"role": "user", "content": "..."}]
print(model.create_chat_completion(messages, temperature=0)["choices"][0]["message"]["content"])
```"""


def usage(target: Target) -> str:
    """llama.cpp, its Python binding, and the apps that are built on it."""
    options = f"-m {FILE_NAME} -c {target.max_context}"
    if target.cache == "float32":
        options += " --cache-type-k f32 --cache-type-v f32 --flash-attn off"
    return (
        f"llama.cpp runs `{FILE_NAME}` by itself: tokenizer, chat template and the tokens that end "
        "a text are in it. It was run here through its Python binding, llama-cpp-python:\n\n"
        f"{_GENERATION}\n\n"
        "The same file is for llama.cpp's own programs and for apps that are built on llama.cpp, "
        "on phones too. These were not run here:\n\n"
        f"```sh\nllama-cli {options}\nllama-server {options}\n```"
    )


def main_file(files: Collection[str]) -> str:
    """The file that a runtime opens."""
    return FILE_NAME


def packages(target: Target) -> tuple[str, ...]:
    """The distributions whose versions determine the bytes of the artifact."""
    return ("gguf",)


def native(target: Target) -> bool:
    """False: the native runner runs only ExecuTorch programs."""
    return False


def interpreted(target: Target) -> bool:
    """No: llama.cpp runs here."""
    return False


def integers(config: "ModelConfig", schemes: "Mapping[str, Scheme]", target: Target) -> bool:
    """Whether every matrix is quantized: llama.cpp multiplies such a one with int8 activations."""
    return all(scheme.bits for name, scheme in schemes.items() if config.is_multiplied(name))


def rounding(schemes: "Mapping[str, Scheme]", target: Target, prompt: int) -> "Rounding | None":
    """int8 in blocks of 32 if a matrix is quantized; else the type of the float matrices, or
    float16, in which attention computes unless the cache is float32."""
    from exporter.quantization.activations import (
        round_blocks_to_q8_0,
        round_to_bfloat16,
        round_to_half,
    )

    if any(scheme.bits for scheme in schemes.values()):
        return round_blocks_to_q8_0
    if target.floats == "bfloat16":
        return round_to_bfloat16
    return round_to_half if "float16" in (target.floats, target.cache) else None


def cache_rounding(target: Target) -> None:
    """None: `rounding` covers a cache in float16."""


def largest_activation(target: Target, which: str) -> float | None:
    """The largest float16 for a cache of that type, and for all inputs of float16 matrices."""
    from exporter.quantization.activations import LARGEST_HALF

    kinds = {"keys": target.cache, "values": target.cache, "input": target.floats}
    return LARGEST_HALF if kinds.get(which) == "float16" else None


def lower(quantized: "QuantizedCheckpoint", target: Target, out: Path) -> Artifact:
    """Write `out`/model.gguf."""
    from exporter.backends.gguf import lowering

    check(quantized.config, quantized.schemes, target)
    return lowering.lower(quantized, target, out)


def load(artifact: Artifact, variant: str = "") -> Runner:
    """The artifact in llama.cpp, on the CPU."""
    from exporter.backends.gguf.runtime import LlamaRunner

    assert isinstance(artifact.target, Target)
    return LlamaRunner(artifact.path / FILE_NAME, artifact.target)


def cross_checks(artifact: Artifact) -> tuple[str, ...]:
    """None: `load` runs llama.cpp itself on every machine."""
    return ()


def weights(
    artifact: Artifact, quantized: "QuantizedCheckpoint"
) -> "Iterator[tuple[str, str, QuantizedTensor | Tensor]]":
    """Every weight decoded from the file: name, tensor of the file, codes and scales or floats."""
    from exporter.backends.gguf import contents, decoding

    return decoding.read_weights(contents.open_contents(artifact.path / FILE_NAME), quantized)


def differences(found: Artifact, expected: Artifact) -> "Iterator[tuple[str, str]]":
    """How the file of `found` differs from that of `expected`.

    Compared are the version, all metadata with their types, and every tensor with its type, shape
    and data. Left out are the order of keys and tensors, the alignment of the data and the bytes
    between and after them.
    """
    from exporter.backends.gguf import comparison

    return comparison.differences(found.path / FILE_NAME, expected.path / FILE_NAME)


def inspect(path: Path) -> Inspection:
    """The content of a .gguf from any tool. Raises InputError."""
    from exporter.backends.gguf import inspection

    return inspection.inspect(path)
