"""Predict the size of a Core ML package."""

import math
from collections.abc import Mapping

from exporter.backends import Prediction
from exporter.backends.coreml import Target
from exporter.model.config import ModelConfig
from exporter.quantization.schemes import FLOAT, Scheme

#: Type of activations → bytes of a layer's operations in both functions, and of its q/k norm. A
#: norm in float16 has more operations.
_LAYER_BYTES = {"float16": (38_500, 9_100), "float32": (34_900, 5_200)}
#: Bytes of the rest of the program.
_PROGRAM_BYTES = 15_000
#: Bytes of the form for the Neural Engine that a layer has besides.
_NEURAL_ENGINE_BYTES = 2_300
#: Bytes of a weight's record and of its mean padding.
_RECORD = 96


def predict(config: ModelConfig, schemes: Mapping[str, Scheme], target: Target) -> Prediction:
    """The size of a package. The constants above were fitted to packages that `lower` wrote."""
    width, shapes = 2 if target.activations == "float16" else 4, config.parameter_shapes()
    palettes = target.compute == "neural_engine"
    weights = sum(_bytes(schemes[name], shape, width, palettes) for name, shape in shapes.items())
    tables = (2 * target.max_context + config.head_dim) * config.head_dim * width
    biases = width * sum({shape[0] for shape in shapes.values() if len(shape) == 2})
    layer, qk_norm = _LAYER_BYTES[target.activations]
    layer += qk_norm * config.use_qk_norm + _NEURAL_ENGINE_BYTES * palettes
    alone = target.interface == "language_model"
    if alone:
        layer //= 2  # one function; it has as much besides its layers as two others have
    program = _PROGRAM_BYTES + layer * config.num_hidden_layers
    if target.prefill == 1:  # inside a .pte: a single function
        program //= 2
    file = weights + tables + biases + program
    kv_cache = config.kv_cache_bytes(target.max_context, bytes_per_value=2)
    widest = max(config.num_attention_heads * target.max_context, 4 * config.intermediate_size)
    if alone:
        widest += config.vocab_size  # the logits of every token
    activations = width * target.prefill * widest
    return Prediction(file, kv_cache, file + kv_cache + activations)


def _bytes(scheme: Scheme, shape: tuple[int, ...], width: int, palettes: bool) -> int:
    """Bytes of a weight: codes and scales, or 16 values for each row, each with a record.

    Float weights are float32, since float16 rarely holds a whole matrix exactly.
    """
    if scheme == FLOAT:
        return 4 * math.prod(shape) + _RECORD
    codes = math.prod(shape) * (scheme.bits or 0) // 8
    width *= 16 if palettes and scheme.bits == 4 else 1
    return codes + width * math.prod(scheme.scale_shape(shape)) + 2 * _RECORD
