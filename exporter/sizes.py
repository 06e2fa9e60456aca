"""What an export will weigh, before it is made."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from exporter.model import ModelConfig
from exporter.quantization.integers import FLOAT, Scheme
from exporter.quantization.waist import EMBEDDING
from exporter.recipe import Target

#: Program, XNNPACK graphs and padding: for the file as a whole, and for each layer of it.
_PROGRAM_BYTES, _LAYER_BYTES = 12_000, 10_500
#: The runtime itself, without Python.
_RUNTIME_BYTES = 12_000_000


@dataclass(frozen=True)
class Prediction:
    """Bytes. `memory` is the peak of a process that runs a full context on the device's CPU."""

    file: int
    kv_cache: int
    memory: int


def predict(config: ModelConfig, schemes: Mapping[str, Scheme], target: Target) -> Prediction:
    """The size of an ExecuTorch artifact of this plan; the file within one per cent."""
    context = target.max_context
    weights = sum(
        _stored_bytes(schemes[name], shape) for name, shape in config.parameter_shapes().items()
    )
    tables = 2 * context * config.head_dim * 4
    embedding = config.parameter_shapes()[EMBEDDING]
    # The lookup table needs float32 scales of its own; a float table is not shared.
    scheme = schemes[EMBEDDING]
    table = 4 * math.prod(scheme.scale_shape(embedding)) if scheme != FLOAT else 0
    if scheme == FLOAT and config.tie_word_embeddings:
        table = 4 * math.prod(embedding)
    overhead = _PROGRAM_BYTES + _LAYER_BYTES * config.num_hidden_layers
    file = weights + table + tables + overhead
    kv_cache = config.kv_cache_bytes(context, bytes_per_value=4)
    # XNNPACK repacks every filter; of the file itself the tables stay mapped.
    return Prediction(file, kv_cache, file + weights + kv_cache + _RUNTIME_BYTES)


def _stored_bytes(scheme: Scheme, shape: tuple[int, ...]) -> int:
    if scheme == FLOAT:
        return 4 * math.prod(shape)
    codes = math.prod(shape) * (scheme.bits or 0) // 8
    scale = 2 if scheme.group_size else 4
    return codes + scale * math.prod(scheme.scale_shape(shape))
