"""Predict the size of a .pte for XNNPACK."""

from collections.abc import Mapping

from exporter.backends import Prediction
from exporter.backends._sizes import RUNTIME_BYTES, stored_bytes
from exporter.backends.executorch import Target, longest_call
from exporter.model.config import EMBEDDING, ModelConfig
from exporter.quantization.schemes import Scheme

#: Bytes of program, XNNPACK graphs and padding: per file, and per layer.
_PROGRAM_BYTES, _LAYER_BYTES = 12_000, 10_500
#: Bytes of the program that a layer has more with an int8 cache.
_INT8_CACHE_LAYER_BYTES = 4_300
#: The float32 scale and the int8 zero point of a head in an int8 cache.
_INT8_CACHE_HEAD_BYTES = 5
#: Tokens that the native runner reads in one call, and the bytes of the embedding's table that it
#: maps for each: a piece with the codes and one with the scales (devices/runner/loader.h).
_CALL, _LOOKED_UP_BYTES = 128, 2 * 16384


def predict(config: ModelConfig, schemes: Mapping[str, Scheme], target: Target) -> Prediction:
    shapes = config.parameter_shapes()
    weights = sum(stored_bytes(schemes[name], shape) for name, shape in shapes.items())
    table = stored_bytes(schemes[EMBEDDING], shapes[EMBEDDING])
    layer = _LAYER_BYTES + (_INT8_CACHE_LAYER_BYTES if target.kv_cache == "int8" else 0)
    overhead = _PROGRAM_BYTES + layer * config.num_hidden_layers
    file = weights + overhead
    kv_cache = _cache_bytes(config, target)
    packed = sum(
        _packed_bytes(schemes[name], shape)
        for name, shape in shapes.items()
        if name != EMBEDDING or config.tie_word_embeddings
    )
    call = min(_CALL, longest_call(target))
    looked_up = min(table, call * _LOOKED_UP_BYTES)
    memory = packed + kv_cache + looked_up + call * _token_bytes(config, target) + RUNTIME_BYTES
    return Prediction(file, kv_cache, memory)


def _cache_bytes(config: ModelConfig, target: Target) -> int:
    if target.kv_cache == "int8":
        return config.kv_cache_bytes(target.max_context, 1, _INT8_CACHE_HEAD_BYTES)
    return config.kv_cache_bytes(target.max_context, bytes_per_value=4)


def _packed_bytes(scheme: Scheme, shape: tuple[int, ...]) -> int:
    """Bytes of a weight repacked by XNNPACK: codes, scales, and two numbers per row."""
    return stored_bytes(scheme, shape) + 8 * shape[0]


def _token_bytes(config: ModelConfig, target: Target) -> int:
    """Bytes for each token of a call. Between two graphs: residual in and out, q and attention, k,
    v, RoPE. Inside one: an input, and three values of the MLP at once. The portable attention has
    its scores twice."""
    heads = config.num_attention_heads + config.num_key_value_heads + 1
    between = 2 * config.hidden_size + 2 * heads * config.head_dim
    inside = config.hidden_size + 3 * config.intermediate_size
    scores = 2 * config.num_attention_heads * target.max_context
    return 4 * (between + inside + (scores if target.attention == "portable" else 0))
