"""Predict the size of an ONNX artifact."""

import math
from collections.abc import Mapping

from exporter.backends import Prediction
from exporter.backends._sizes import RUNTIME_BYTES
from exporter.backends.onnx import Target
from exporter.model.config import EMBEDDING, OUTPUT, ModelConfig
from exporter.quantization.schemes import FLOAT, Scheme

#: Bytes of the graph's nodes per layer, and the mean padding of an external tensor.
_LAYER_BYTES, _PADDING = 4_200, 2_048
#: Tensors of at least so many bytes are external.
_MAPPED = 16_384
#: Memory for repacked weights, as a share of the file.
_REPACKED = 0.25


def predict(config: ModelConfig, schemes: Mapping[str, Scheme], target: Target) -> Prediction:
    width = 2 if target.activations == "float16" else 4
    shapes = config.parameter_shapes()
    weights = sum(
        _bytes(name, schemes[name], shape, width, target) for name, shape in shapes.items()
    )
    if config.tie_word_embeddings and schemes[EMBEDDING] == FLOAT:
        weights += width * math.prod(shapes[EMBEDDING])  # the table, and the matrix transposed
    tables = target.max_context * config.head_dim * width
    file = weights + tables + _LAYER_BYTES * config.num_hidden_layers
    kv_cache = config.kv_cache_bytes(target.max_context, width)
    memory = int(file * (1 + _REPACKED)) + kv_cache + RUNTIME_BYTES
    return Prediction(file, kv_cache, memory)


def _bytes(name: str, scheme: Scheme, shape: tuple[int, ...], width: int, target: Target) -> int:
    """Bytes of a weight. Scales have the activations' dtype, and there is one for each block."""
    if scheme == FLOAT:
        return width * math.prod(shape)
    codes = math.prod(shape) * (scheme.bits or 0) // 8
    blocks = shape[1] // (scheme.group_size or math.gcd(shape[1], 256))
    fast_int8 = target.form == "contrib" and target.products == "int8"
    if scheme == Scheme(8) and fast_int8 and name not in (EMBEDDING, OUTPUT):
        blocks = 1
    scales = width * shape[0] * blocks
    mapped = sum(part >= _MAPPED for part in (codes, scales))
    return codes + scales + mapped * _PADDING
