"""ONNX: a graph for ONNX Runtime and its generation client, codes and scales untouched.

    mobilellm lower build/nano-int4 --target onnx -o build/nano-onnx

The graph is built node by node, not traced. `forms` decides which nodes it has, `graph` builds it,
`layout` packs and unpacks codes and scales, and `lowering` makes the artifact. `contents` and `ort`
read the files again, `decoding` decodes the weights that it finds there, and `comparison` compares
two models. onnxruntime-genai runs the artifact's folder unchanged.
"""

from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from exporter import backends
from exporter.backends import Artifact, Prediction, Runner, check_context
from exporter.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from exporter.model.config import ModelConfig
    from exporter.quantization.activations import Rounding
    from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint
    from exporter.quantization.schemes import QuantizedTensor, Scheme

EXTRA, TOOLKIT = "onnx", ("onnx", "onnxruntime")
RUNTIME_EXTRA, RUNTIME = EXTRA, TOOLKIT
#: The folder of the graph, as transformers.js wants it.
FOLDER = "onnx"
#: The name of the graph for each data type that transformers.js asks for; `schemes.data_type` says
#: which one an artifact has.
STEMS = {
    "q4": "model_q4", "q4f16": "model_q4f16", "int8": "model_int8", "fp32": "model",
    "fp16": "model_fp16",
}  # fmt: skip
GRAPHS = tuple(f"{FOLDER}/{stem}.onnx" for stem in STEMS.values())
#: Ends the name of the data file: in a browser, transformers.js looks for no other.
DATA = "_data"
#: Ends the name of the .ort file, and of the list of its operators, in place of ``.onnx``.
ORT, OPERATORS = ".ort", ".required_operators.config"
#: The option of a session that keeps products of the portable form in float: where ONNX Runtime
#: makes one MatMulNBits of DequantizeLinear and MatMul, it else rounds activations to int8.
FLOAT_PRODUCTS = ("session.qdq_matmulnbits_accuracy_level", "1")
#: The most tokens of a prompt that are read in one call: memory for scores and activations grows
#: with them.
CHUNK = 512
GENAI_CONFIG, CONFIG, TOKENIZER_CONFIG = (
    "genai_config.json", "config.json", "tokenizer_config.json",
)  # fmt: skip
FILES = (
    *GRAPHS,
    *(f"{graph}{DATA}" for graph in GRAPHS),
    *(graph.removesuffix(".onnx") + end for graph in GRAPHS for end in (ORT, OPERATORS)),
    GENAI_CONFIG,
    CONFIG,
    TOKENIZER_CONFIG,
)
SUFFIX = ""


class Target(backends.Target):
    """An .onnx with ONNX Runtime's own operators (``contrib``) or standard ones (``portable``).

    `products: int8` lets matrix products round activations to int8, which is faster. `ort` adds
    the .ort file and the list of operators for a reduced mobile build of ONNX Runtime.
    """

    target: Literal["onnx"] = "onnx"
    form: Literal["contrib", "portable"] = "contrib"
    activations: Literal["float32", "float16"] = "float32"
    products: Literal["int8", "float"] = "int8"
    ort: bool = False


def check(config: "ModelConfig", schemes: "Mapping[str, Scheme]", target: Target) -> None:
    """Raise InputError for options or schemes that the form does not support."""
    from exporter.backends._storage import check_stored
    from exporter.backends.onnx.schemes import stores

    check_context(config, target)
    if target.form == "portable" and target.products == "int8":
        raise InputError(
            "products",
            "'int8' needs ONNX Runtime's own operators, which the portable form leaves out",
            "Set products to float, or form to contrib",
        )
    check_stored(config, schemes, partial(stores, target=target))


def check_folder(folder: Path, target: Target) -> None:
    """The files of a model folder are copied as they are, whatever they hold."""


def predict(config: "ModelConfig", schemes: "Mapping[str, Scheme]", target: Target) -> Prediction:
    """The file size within 1 % (2 % for the smallest), the memory within 10 % on x86-64."""
    from exporter.backends.onnx import size

    return size.predict(config, schemes, target)


_GENERATION = """\
```python
# pip install onnxruntime-genai
import onnxruntime_genai as genai

model = genai.Model(".")
tokenizer, parameters = genai.Tokenizer(model), genai.GeneratorParams(model)
parameters.set_search_options(max_length=512, do_sample=False)
generator = genai.Generator(model, parameters)
generator.append_tokens(tokenizer.encode("..."))  # a prompt in the form of the chat template
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
```"""


def usage(target: Target) -> str:
    """onnxruntime-genai and optimum run the folder; ONNX Runtime itself runs the graph."""
    text = (
        "onnxruntime-genai runs the folder as it is, here in Python; it has libraries for Android "
        f"and iOS too:\n\n{_GENERATION}\n\n"
        'optimum-onnx reads it with `ORTModelForCausalLM.from_pretrained(".")`. All read one text '
        "at a time."
    )
    if target.form == "contrib":
        return text
    option, value = FLOAT_PRODUCTS
    return (
        f"{text} Every runtime for ONNX of operator set 23 runs the graph in `{FOLDER}/`, which "
        "reads tokens and the cache, and gives logits and the longer cache. In ONNX Runtime, set "
        f"`{option}` to `{value}` in the options of the session, as `{GENAI_CONFIG}` does: it else "
        "rounds activations to int8."
    )


def main_file(files: Collection[str]) -> str:
    """The graph. An artifact has one; of a damaged list of files it is the first that is known."""
    return next((name for name in GRAPHS if name in files), GRAPHS[0])


def packages(target: Target) -> tuple[str, ...]:
    """The distributions whose versions determine the bytes of the artifact."""
    return "onnx", "onnxruntime"


def native(target: Target) -> bool:
    """False: the native runner runs only ExecuTorch programs."""
    return False


def interpreted(target: Target) -> bool:
    """No: ONNX Runtime runs here."""
    return False


def integers(config: "ModelConfig", schemes: "Mapping[str, Scheme]", target: Target) -> bool:
    """ONNX Runtime's own operators multiply integers, unless a weight is float."""
    multiplied = [scheme for name, scheme in schemes.items() if config.is_multiplied(name)]
    return target.form == "contrib" and all(scheme.bits for scheme in multiplied)


def rounding(schemes: "Mapping[str, Scheme]", target: Target, prompt: int) -> "Rounding | None":
    """MatMulNBits rounds activations to int8 with one scale per block of a row.

    DynamicQuantizeMatMul, for int8 weights without groups, uses one scale for each chunk of the
    prompt.
    """
    from exporter.backends.onnx.schemes import LARGEST_BLOCK
    from exporter.model.config import EMBEDDING, OUTPUT
    from exporter.quantization.activations import round_blocks_to_int8, round_prompt_to_int8
    from exporter.quantization.schemes import FLOAT, Scheme

    if target.products == "float":
        return None
    linear = [scheme for name, scheme in schemes.items() if name not in (EMBEDDING, OUTPUT)]
    if Scheme(8) in linear:
        return partial(round_prompt_to_int8, prompt=prompt, chunk=CHUNK)
    groups = [scheme.group_size or LARGEST_BLOCK for scheme in linear if scheme != FLOAT]
    return partial(round_blocks_to_int8, block=max(groups, default=LARGEST_BLOCK))


def cache_rounding(target: Target) -> None:
    """None: the cache has the type of the activations, whose rounding `rounding` says."""


def largest_activation(target: Target, which: str) -> float | None:
    """The largest float16 for float16 activations, None for float32."""
    from exporter.quantization.activations import LARGEST_HALF

    return LARGEST_HALF if target.activations == "float16" else None


def lower(quantized: "QuantizedCheckpoint", target: Target, out: Path) -> Artifact:
    """Write the graph, its data file, what clients read, and with `ort` the .ort files."""
    from exporter.backends.onnx import lowering

    check(quantized.config, quantized.schemes, target)
    return lowering.lower(quantized, target, out)


def load(artifact: Artifact, variant: str = "") -> Runner:
    """The artifact in ONNX Runtime."""
    from exporter.backends.onnx import lowering

    return lowering.OnnxRunner(
        artifact.path / main_file(artifact.files), artifact.target.max_context
    )


def cross_checks(artifact: Artifact) -> tuple[str, ...]:
    """None: `load` runs ONNX Runtime itself on every machine."""
    return ()


def weights(
    artifact: Artifact, quantized: "QuantizedCheckpoint"
) -> "Iterator[tuple[str, str, QuantizedTensor | Tensor]]":
    """Every weight decoded from the model and its data file: name, place, codes and scales."""
    from exporter.backends.onnx import contents, decoding

    graph = artifact.path / main_file(artifact.files)
    return decoding.read_weights(contents.open_contents(graph), quantized)


def differences(found: Artifact, expected: Artifact) -> "Iterator[tuple[str, str]]":
    """How the model and its companions in `found` differ from those in `expected`.

    Left out are the places of tensors in the data file, the order of initializers, attributes,
    metadata and operator sets, and ``producer_version``.
    """
    from exporter.backends.onnx import comparison

    return comparison.differences(found.path, expected.path, expected.files)
