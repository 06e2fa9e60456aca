"""Predict the size of a GGUF file, and the memory of llama.cpp."""

import math
from collections.abc import Mapping

from exporter.backends import Prediction
from exporter.backends.gguf import Target
from exporter.backends.gguf.schemes import BLOCK, BLOCK_TYPES
from exporter.model.config import EMBEDDING, ModelConfig
from exporter.quantization.schemes import FLOAT, Scheme

#: Bytes of a float, by its type in the target.
_WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2}
#: Bytes of the metadata but for the tokenizer, and of the entry of a tensor.
_METADATA_BYTES, _TENSOR_BYTES = 2_000, 72
#: Bytes of a token with its type and its merge, as SmolLM2 has them (39 in Qwen3). By the number of
#: tokens, the bytes of a tokenizer that has more merges than tokens: Llama 3's, which is R1's.
_TOKEN_BYTES, _TOKENIZER_BYTES = 36, {128_256: 7_818_000}
#: The cache has a multiple of so many positions.
_CACHE_MULTIPLE = 256
#: Tokens that are read at once, which decides the size of the buffers of a call.
_CHUNK = 512
#: Memory of llama.cpp besides weights, cache, buffers and tokenizer, and that of a tokenizer for
#: each of its bytes in the file: its tables of tokens and merges.
_RUNTIME_BYTES, _TABLES = 3_000_000, 4.7


def predict(config: ModelConfig, schemes: Mapping[str, Scheme], target: Target) -> Prediction:
    shapes = config.parameter_shapes()
    sizes = {name: _bytes(schemes[name], shape, target) for name, shape in shapes.items()}
    weights = sum(sizes.values())
    if config.tie_word_embeddings and config.model_type == "olmo2":
        weights += sizes[EMBEDDING]  # llama.cpp demands an output layer
    count = len(shapes)
    if config.qk_norm is not None and not config.qk_norm.weighted:
        count += 2 * config.num_hidden_layers
        weights += 2 * config.num_hidden_layers * config.head_dim * 4  # norms of ones
    tokenizer = _TOKENIZER_BYTES.get(config.vocab_size, _TOKEN_BYTES * config.vocab_size)
    file = weights + _METADATA_BYTES + _TENSOR_BYTES * count + tokenizer
    positions = -(-target.max_context // _CACHE_MULTIPLE) * _CACHE_MULTIPLE
    kv_cache = config.kv_cache_bytes(positions, _WIDTHS[target.cache])
    rest = _buffers(config, target) + int(_TABLES * tokenizer) + _RUNTIME_BYTES
    return Prediction(file, kv_cache, file + kv_cache + rest)


def _bytes(scheme: Scheme, shape: tuple[int, ...], target: Target) -> int:
    if scheme == FLOAT:
        return math.prod(shape) * (4 if len(shape) == 1 else _WIDTHS[target.floats])
    return math.prod(shape) // BLOCK * BLOCK_TYPES[scheme.code_bits][1]


def _buffers(config: ModelConfig, target: Target) -> int:
    """The buffers of a call that reads a chunk of a prompt."""
    chunk = min(_CHUNK, target.max_context)
    width = 2 * config.intermediate_size + 4 * config.hidden_size
    return 4 * chunk * width
