"""What an export will weigh, before it is made."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from devices.prediction import Workload
from exporter.model.config import EMBEDDING, OUTPUT, ModelConfig
from exporter.quantization.schemes import FLOAT, Scheme
from exporter.recipe import CoreMLTarget, ExecuTorchTarget, OnnxTarget, Target

#: Program, XNNPACK graphs and padding: for the file as a whole, and for each layer of it.
_PROGRAM_BYTES, _LAYER_BYTES = 12_000, 10_500
#: The nodes of an ONNX graph, for each layer; the mean padding of a tensor that is mapped, which
#: is one of at least so many bytes.
_ONNX_LAYER_BYTES, _ONNX_PADDING, _ONNX_MAPPED = 4_200, 2_048, 16_384
#: Share of an ONNX file that the runtime holds on top of it, as repacked weights.
_ONNX_REPACKED = 0.25
#: The operations of a Core ML layer in both functions, more with q/k norm; what is there once; the
#: record of a weight and its mean padding.
_COREML_LAYER_BYTES, _COREML_QK_NORM_BYTES, _COREML_PROGRAM_BYTES = 34_900, 5_200, 15_000
_COREML_RECORD = 96
#: What the runtime takes beside weights, tables and planned memory.
_RUNTIME_BYTES = 12_000_000


@dataclass(frozen=True)
class Prediction:
    """Bytes. `memory` is what loading and running add to a process, prompts up to some hundred
    tokens; measured on x86-64 with nano, 140M and 950M shapes, it is within a tenth. For Core ML
    it is only counted (file, cache and activations), for want of a device to measure on."""

    file: int
    kv_cache: int
    memory: int


def predict(config: ModelConfig, schemes: Mapping[str, Scheme], target: Target) -> Prediction:
    """The size of an artifact of this plan; the file within one per cent, two for the smallest."""
    if isinstance(target, OnnxTarget):
        return _predict_onnx(config, schemes, target)
    if isinstance(target, CoreMLTarget):
        return _predict_coreml(config, schemes, target)
    if target.delegate == "coreml":
        one_step = CoreMLTarget(
            max_context=target.max_context, prefill=1, activations=target.activations
        )
        return _predict_coreml(config, schemes, one_step)
    return _predict_executorch(config, schemes, target)


def workload(config: ModelConfig, schemes: Mapping[str, Scheme], target: Target) -> Workload:
    """What a decode step reads and multiplies: every matrix but a lookup table, and the cache."""
    shapes = config.parameter_shapes()
    multiplied = [
        name
        for name, shape in shapes.items()
        if len(shape) == 2 and (name != EMBEDDING or config.tie_word_embeddings)
    ]
    sizes = predict(config, schemes, target)
    heads = config.num_attention_heads * config.head_dim * config.num_hidden_layers
    return Workload(
        weight_bytes=sum(_stored_bytes(schemes[name], shapes[name]) for name in multiplied),
        products=sum(math.prod(shapes[name]) for name in multiplied),
        cache_bytes=sizes.kv_cache // target.max_context,
        cache_products=2 * heads,
        memory=sizes.memory,
    )


def _predict_executorch(
    config: ModelConfig, schemes: Mapping[str, Scheme], target: ExecuTorchTarget
) -> Prediction:
    shapes = config.parameter_shapes()
    weights = sum(_stored_bytes(schemes[name], shape) for name, shape in shapes.items())
    table = _table_bytes(config, schemes) + 2 * target.max_context * config.head_dim * 4
    tied_codes = 0
    if config.tie_word_embeddings:
        bits = schemes[EMBEDDING].bits or 32
        tied_codes = math.prod(shapes[EMBEDDING]) * bits // 8
    untied_table = (
        0 if config.tie_word_embeddings else _stored_bytes(schemes[EMBEDDING], shapes[EMBEDDING])
    )
    overhead = _PROGRAM_BYTES + _LAYER_BYTES * config.num_hidden_layers
    file = weights - untied_table + table - tied_codes + overhead
    kv_cache = config.kv_cache_bytes(target.max_context, bytes_per_value=4)
    packed = sum(
        _packed_bytes(schemes[name], shape)
        for name, shape in shapes.items()
        if name != EMBEDDING or config.tie_word_embeddings
    )
    memory = table + packed + kv_cache + _activation_bytes(config, target) + _RUNTIME_BYTES
    return Prediction(file, kv_cache, memory)


def _stored_bytes(scheme: Scheme, shape: tuple[int, ...]) -> int:
    """A filter in the file: group scales are bfloat16, scales of a row float32."""
    if scheme == FLOAT:
        return 4 * math.prod(shape)
    codes = math.prod(shape) * (scheme.bits or 0) // 8
    scale = 2 if scheme.group_size else 4
    return codes + scale * math.prod(scheme.scale_shape(shape))


def _table_bytes(config: ModelConfig, schemes: Mapping[str, Scheme]) -> int:
    """The embedding as a lookup table: it has float32 scales of its own."""
    scheme, shape = schemes[EMBEDDING], config.parameter_shapes()[EMBEDDING]
    if scheme == FLOAT:
        return 4 * math.prod(shape)
    codes = math.prod(shape) * (scheme.bits or 0) // 8
    return codes + 4 * math.prod(scheme.scale_shape(shape))


def _packed_bytes(scheme: Scheme, shape: tuple[int, ...]) -> int:
    """A weight as XNNPACK repacks it in memory: float32 scales, and two numbers a row."""
    if scheme == FLOAT:
        return 4 * math.prod(shape)
    codes = math.prod(shape) * (scheme.bits or 0) // 8
    return codes + 4 * math.prod(scheme.scale_shape(shape)) + 8 * shape[0]


def _activation_bytes(config: ModelConfig, target: ExecuTorchTarget) -> int:
    """The planned memory between two graphs: residual in and out, q and attention, k, v, RoPE."""
    heads = config.num_attention_heads + config.num_key_value_heads + 1
    width = 2 * config.hidden_size + 2 * heads * config.head_dim
    return 4 * target.max_context * width


def _predict_onnx(
    config: ModelConfig, schemes: Mapping[str, Scheme], target: OnnxTarget
) -> Prediction:
    width = 2 if target.activations == "float16" else 4
    shapes = config.parameter_shapes()
    weights = sum(
        _onnx_bytes(name, schemes[name], shape, width, target) for name, shape in shapes.items()
    )
    if config.tie_word_embeddings and schemes[EMBEDDING] == FLOAT:
        weights += width * math.prod(shapes[EMBEDDING])  # the table, and the matrix transposed
    tables = target.max_context * config.head_dim * width
    file = weights + tables + _ONNX_LAYER_BYTES * config.num_hidden_layers
    kv_cache = config.kv_cache_bytes(target.max_context, width)
    memory = int(file * (1 + _ONNX_REPACKED)) + kv_cache + _RUNTIME_BYTES
    return Prediction(file, kv_cache, memory)


def _onnx_bytes(
    name: str, scheme: Scheme, shape: tuple[int, ...], width: int, target: OnnxTarget
) -> int:
    """Codes, and scales as wide as the activations; a row's scale is repeated for its blocks."""
    if scheme == FLOAT:
        return width * math.prod(shape)
    codes = math.prod(shape) * (scheme.bits or 0) // 8
    blocks = shape[1] // (scheme.group_size or math.gcd(shape[1], 256))
    fast_int8 = target.form == "contrib" and target.products == "int8"
    if scheme == Scheme(8) and fast_int8 and name not in (EMBEDDING, OUTPUT):
        blocks = 1
    scales = width * shape[0] * blocks
    mapped = sum(part >= _ONNX_MAPPED for part in (codes, scales))
    return codes + scales + mapped * _ONNX_PADDING


def _predict_coreml(
    config: ModelConfig, schemes: Mapping[str, Scheme], target: CoreMLTarget
) -> Prediction:
    width, shapes = 2 if target.activations == "float16" else 4, config.parameter_shapes()
    weights = sum(_coreml_bytes(schemes[name], shape, width) for name, shape in shapes.items())
    tables = (2 * target.max_context + config.head_dim) * config.head_dim * width
    biases = width * sum({shape[0] for shape in shapes.values() if len(shape) == 2})
    layer = _COREML_LAYER_BYTES + (_COREML_QK_NORM_BYTES if config.use_qk_norm else 0)
    program = _COREML_PROGRAM_BYTES + layer * config.num_hidden_layers
    if target.prefill == 1:  # a delegate's: one function
        program //= 2
    file = weights + tables + biases + program
    kv_cache = config.kv_cache_bytes(target.max_context, bytes_per_value=2)
    widest = max(config.num_attention_heads * target.max_context, 4 * config.intermediate_size)
    activations = width * target.prefill * widest
    return Prediction(file, kv_cache, file + kv_cache + activations)


def _coreml_bytes(scheme: Scheme, shape: tuple[int, ...], width: int) -> int:
    """Codes and their scales, each with a record. What is left in float is float32: float16
    seldom holds every number of a matrix."""
    if scheme == FLOAT:
        return 4 * math.prod(shape) + _COREML_RECORD
    codes = math.prod(shape) * (scheme.bits or 0) // 8
    return codes + width * math.prod(scheme.scale_shape(shape)) + 2 * _COREML_RECORD
