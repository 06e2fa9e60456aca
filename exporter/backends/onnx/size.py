"""Predict the size of an ONNX artifact."""

import math
from collections.abc import Mapping

from exporter.backends import Prediction
from exporter.backends._sizes import RUNTIME_BYTES
from exporter.backends.onnx import Target
from exporter.backends.onnx.schemes import LARGEST_BLOCK, in_whole_rows
from exporter.model.config import EMBEDDING, ModelConfig
from exporter.quantization.schemes import FLOAT, Scheme

#: Bytes of the graph's nodes per layer, and the mean padding of an external tensor.
_LAYER_BYTES, _PADDING = 4_200, 2_048
#: Tensors of at least so many bytes are external.
_MAPPED = 16_384
_SCALE_BYTES = 2
#: Memory for repacked weights, as a share of the file.
_REPACKED = 0.25


def predict(config: ModelConfig, schemes: Mapping[str, Scheme], target: Target) -> Prediction:
    width = 2 if target.activations == "float16" else 4
    shapes = config.parameter_shapes()
    weights = sum(
        _bytes(name, schemes[name], shape, width, target) for name, shape in shapes.items()
    )
    widened = (width - _SCALE_BYTES) * sum(
        _scales(name, schemes[name], shape, target) for name, shape in shapes.items()
    )
    if config.tie_word_embeddings and schemes[EMBEDDING] == FLOAT:
        weights += width * math.prod(shapes[EMBEDDING])  # the table, and the matrix transposed
    tables = target.max_context * config.head_dim * width
    file = weights + tables + _LAYER_BYTES * config.num_hidden_layers
    kv_cache = config.kv_cache_bytes(target.max_context, width)
    memory = int((file + widened) * (1 + _REPACKED)) + kv_cache + RUNTIME_BYTES
    return Prediction(file, kv_cache, memory)


def _bytes(name: str, scheme: Scheme, shape: tuple[int, ...], width: int, target: Target) -> int:
    """Bytes of a weight. Scales are float16, and there is one for each block."""
    if scheme == FLOAT:
        return width * math.prod(shape)
    codes = math.prod(shape) * (scheme.bits or 0) // 8
    scales = _SCALE_BYTES * _scales(name, scheme, shape, target)
    mapped = sum(part >= _MAPPED for part in (codes, scales))
    return codes + scales + mapped * _PADDING


def _scales(name: str, scheme: Scheme, shape: tuple[int, ...], target: Target) -> int:
    """The number of scales of a weight: one for each block."""
    if scheme == FLOAT:
        return 0
    if in_whole_rows(name, scheme, target):
        return shape[0]
    return shape[0] * (shape[1] // (scheme.group_size or math.gcd(shape[1], LARGEST_BLOCK)))
