"""Predict the size of a Core ML package."""

import math
from collections.abc import Mapping

from exporter.backends import Prediction
from exporter.backends.coreml import Target
from exporter.model.config import ModelConfig
from exporter.quantization.schemes import FLOAT, Scheme

#: Bytes of a layer's operations in both functions, of its q/k norm, and of the rest of the program.
_LAYER_BYTES, _QK_NORM_BYTES, _PROGRAM_BYTES = 34_900, 5_200, 15_000
#: Bytes of a weight's record and of its mean padding.
_RECORD = 96


def predict(config: ModelConfig, schemes: Mapping[str, Scheme], target: Target) -> Prediction:
    """The size of a package. The constants above were fitted to packages that `lower` wrote."""
    width, shapes = 2 if target.activations == "float16" else 4, config.parameter_shapes()
    weights = sum(_bytes(schemes[name], shape, width) for name, shape in shapes.items())
    tables = (2 * target.max_context + config.head_dim) * config.head_dim * width
    biases = width * sum({shape[0] for shape in shapes.values() if len(shape) == 2})
    layer = _LAYER_BYTES + (_QK_NORM_BYTES if config.use_qk_norm else 0)
    program = _PROGRAM_BYTES + layer * config.num_hidden_layers
    if target.prefill == 1:  # inside a .pte: a single function
        program //= 2
    file = weights + tables + biases + program
    kv_cache = config.kv_cache_bytes(target.max_context, bytes_per_value=2)
    widest = max(config.num_attention_heads * target.max_context, 4 * config.intermediate_size)
    activations = width * target.prefill * widest
    return Prediction(file, kv_cache, file + kv_cache + activations)


def _bytes(scheme: Scheme, shape: tuple[int, ...], width: int) -> int:
    """Bytes of a weight: codes and scales, each with a record.

    Float weights are float32, since float16 rarely holds a whole matrix exactly.
    """
    if scheme == FLOAT:
        return 4 * math.prod(shape) + _RECORD
    codes = math.prod(shape) * (scheme.bits or 0) // 8
    return codes + width * math.prod(scheme.scale_shape(shape)) + 2 * _RECORD
