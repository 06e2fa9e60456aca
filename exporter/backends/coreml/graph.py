"""The decoder as an ML Program of iOS 18: ``prefill`` and ``decode`` over one set of weights.

Both read ``input_ids`` [1, steps] from ``position`` [1] on, keep keys and values in two states
[layers, kv_heads, max_context, head_dim] and give the logits of the last token. ``prefill`` has a
fixed number of steps, of which the first ``length`` [1] count: the others are padding, which is
neither kept nor looked at.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from exporter.backends.coreml import Target
from exporter.backends.coreml.toolkit import Function, Program, coremltools, mb, types
from exporter.model.decoder import ModelConfig, rope_tables
from exporter.quantization.quantized_checkpoint import EMBEDDING, OUTPUT, QuantizedCheckpoint
from exporter.quantization.schemes import QuantizedTensor

PREFILL, DECODE = "prefill", "decode"
#: The one function of a program that has no other.
MAIN = "main"
KEYS, VALUES = "key_cache", "value_cache"
LOGITS, TOKEN = "logits", "token"
#: What is added to the score of a position that must not be seen; float16 holds it exactly.
_UNSEEN = -10000.0

Var = Any  # of coremltools, which has no annotations


def mil_name(weight: str) -> str:
    """A checkpoint's name as an ML Program allows it."""
    return weight.replace(".", "_")


def build_program(quantized: QuantizedCheckpoint, target: Target) -> Program:
    """Both functions. Constants of one name are stored once."""
    program = _program(quantized, target, {PREFILL: target.prefill, DECODE: 1})
    program.default_function_name = DECODE
    program.export_as_multifunction = True
    return program


def build_step(quantized: QuantizedCheckpoint, target: Target) -> Program:
    """What ``decode`` is, alone."""
    return _program(quantized, target, {MAIN: 1})


def _program(
    quantized: QuantizedCheckpoint, target: Target, functions: Mapping[str, int]
) -> Program:
    """Functions by name, each with the number of tokens that it reads at once."""
    program, constants = Program(), _Constants(quantized, target)
    for name, steps in functions.items():
        mb.name_count = Counter()  # of this function alone: names do not depend on what was before
        program.add_function(name, _Decoder(quantized.config, target, constants, steps).function())
    return program


class _Constants:
    """The arrays of the program, each made once and shared by both functions."""

    def __init__(self, quantized: QuantizedCheckpoint, target: Target) -> None:
        self.quantized, self._arrays = quantized, dict[str, np.ndarray]()
        self.float_type = np.float16 if target.activations == "float16" else np.float32

    def shared(self, name: str, array: np.ndarray) -> Var:
        constant = mb.const(val=self._arrays.setdefault(name, array), name=name)
        constant.op.weight_id = name
        return constant

    def matrix(self, name: str) -> Var:
        """A weight [out_features, in_features] in the quantized checkpoint's codes and scales.

        One that was left in float is float32 where float16 does not hold it exactly.
        """
        stored, mil = self.quantized.read(name), mil_name(name)
        if not isinstance(stored, QuantizedTensor):
            exact = torch.equal(stored.half().float(), stored.float())
            float_type = self.float_type if exact else np.float32
            return self.shared(mil, stored.float().numpy().astype(float_type))
        code_type = types.np_int4_dtype if stored.scheme.bits == 4 else np.dtype(np.int8)
        codes, scales = stored.codes.numpy(), stored.scales.numpy()
        return mb.constexpr_blockwise_shift_scale(
            data=self.shared(f"{mil}_codes", codes.astype(code_type)),
            scale=self.shared(f"{mil}_scales", scales.astype(self.float_type)),
            name=mil,
        )

    def vector(self, name: str) -> Var:
        """The weight of a normalization, float32 as that is computed."""
        return self.shared(mil_name(name), self.quantized.float_weight(name).numpy())

    def table(self, name: str, values: Tensor) -> Var:
        return self.shared(name, values.numpy().astype(self.float_type))


class _Decoder:
    """One function of the program."""

    def __init__(
        self, config: ModelConfig, target: Target, constants: _Constants, steps: int
    ) -> None:
        self.config, self.target, self.constants, self.steps = config, target, constants, steps
        self.kind = "fp16" if target.activations == "float16" else "fp32"
        self.padded = steps > 1
        self.cache_shape = (
            config.num_hidden_layers,
            config.num_key_value_heads,
            target.max_context,
            config.head_dim,
        )
        self._made = dict[str, Var]()  # what several operations share

    def function(self) -> Function:
        inputs = {
            "input_ids": mb.TensorSpec((1, self.steps), dtype=types.int32),
            "position": mb.TensorSpec((1,), dtype=types.int32),
        }
        if self.padded:
            inputs["length"] = mb.TensorSpec((1,), dtype=types.int32)
        for state in (KEYS, VALUES):
            inputs[state] = mb.StateTensorSpec(self.cache_shape, dtype=types.fp16)
        with Function(inputs, opset_version=coremltools.target.iOS18) as function:
            self.inputs = function.inputs
            self._locate()
            function.set_outputs([self._output()])
        return function

    def _output(self) -> Var:
        """Logits of the last token [1, 1, vocab_size], or the likeliest next one [1, 1]."""
        config = self.config
        x = self._activation(self._rows(self._matrix(EMBEDDING), self.inputs["input_ids"], axis=0))
        for layer in range(config.num_hidden_layers):
            prefix, last = f"model.layers.{layer}", layer == config.num_hidden_layers - 1
            mlp = f"{prefix}.{config.mlp_name}"
            attended = self._attention(self._norm(x, f"{prefix}.input_layernorm.weight"), layer)
            if last and self.padded:  # nothing after it looks at another position
                x, attended = (self._rows(v, self.last, axis=1) for v in (x, attended))
            x = mb.add(x=x, y=self._linear(attended, f"{prefix}.self_attn.o_proj.weight"))
            normal = self._norm(x, f"{prefix}.post_attention_layernorm.weight")
            gate = mb.silu(x=self._linear(normal, f"{mlp}.gate_proj.weight"))
            inner = mb.mul(x=gate, y=self._linear(normal, f"{mlp}.up_proj.weight"))
            x = mb.add(x=x, y=self._linear(inner, f"{mlp}.down_proj.weight"))
        normal = self._norm(x, "model.norm.weight")
        name = EMBEDDING if config.tie_word_embeddings else OUTPUT
        logits = self._linear(normal, name)
        logits.set_name(LOGITS)
        if self.target.output == "logits":
            return logits
        return mb.reduce_argmax(x=logits, axis=-1, keep_dims=False, name=TOKEN)

    def _locate(self) -> None:
        """What follows from the position alone: RoPE, the mask, and the place in the cache."""
        config, context = self.config, self.target.max_context
        cos, sin = (
            torch.repeat_interleave(table, 2, -1) if config.rope_interleaved else table.repeat(1, 2)
            for table in rope_tables(config, context)
        )
        position = self.inputs["position"]
        offsets = np.arange(self.steps, dtype=np.int32)
        positions = mb.add(x=position, y=offsets)
        # [steps, 1, head_dim]: the same for every head
        self.cos, self.sin = (
            mb.expand_dims(x=self._rows(self.constants.table(name, table), positions, 0), axes=[1])
            for name, table in (("rope_cos", cos), ("rope_sin", sin))
        )
        self.turn = self.constants.table("rope_turn", _quarter_turn(config))
        column = np.arange(context, dtype=np.int32)[None]
        later = mb.greater(x=column, y=mb.expand_dims(x=positions, axes=[1]))
        unseen = mb.mul(x=_as(self.kind, later), y=self._number(_UNSEEN))
        # The heads that share keys lie below each other: [groups * steps, context].
        groups = config.num_attention_heads // config.num_key_value_heads
        self.mask = mb.concat(values=[unseen] * groups, axis=0) if groups > 1 else unseen
        self.end = mb.add(x=position, y=_indices(self.steps))
        if self.padded:
            length = self.inputs["length"]
            self.last = mb.sub(x=length, y=_indices(1))
            # [steps, 1]: which rows of the chunk are text
            self.real = mb.expand_dims(x=mb.less(x=offsets, y=length), axes=[1])

    def _attention(self, x: Var, layer: int) -> Var:
        """Grouped attention over the cache, before the output projection."""
        config, prefix = self.config, f"model.layers.{layer}.self_attn"
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        groups, size = heads // kv_heads, config.head_dim
        q, k, v = (
            mb.reshape(
                x=self._linear(x, f"{prefix}.{part}_proj.weight"), shape=[self.steps, count, size]
            )
            for part, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        q, k = self._rotate(q), self._rotate(k)
        if config.use_qk_norm:
            q, k = self._norm(q), self._norm(k)
        # No key is repeated for its group of heads: their queries are rows of one product.
        q = mb.reshape(x=q, shape=[self.steps, kv_heads, groups, size])
        q = mb.transpose(x=q, perm=[1, 2, 0, 3])
        first, after = _indices(layer, 0), _indices(layer + 1, 0)
        window = {
            "begin": mb.concat(values=[first, self.inputs["position"], _indices(0)], axis=0),
            "end": mb.concat(values=[after, self.end, _indices(0)], axis=0),
            "end_mask": [False, True, False, True],
        }
        keys, values = (
            self._extend(state, mb.transpose(x=new, perm=[1, 0, 2]), layer, window)
            for state, new in ((KEYS, k), (VALUES, v))
        )
        attended = mb.scaled_dot_product_attention(
            query=mb.reshape(x=q, shape=[1, kv_heads, groups * self.steps, size]),
            key=keys,
            value=values,
            attn_mask=self.mask,
        )
        attended = mb.reshape(x=attended, shape=[kv_heads, groups, self.steps, size])
        attended = mb.transpose(x=attended, perm=[2, 0, 1, 3])
        return mb.reshape(x=attended, shape=[1, self.steps, heads * size])

    def _extend(self, state: str, new: Var, layer: int, window: Mapping[str, Any]) -> Var:
        """Write `new` [kv_heads, steps, head_dim] into its window of a layer's cache; then all of
        that cache [1, kv_heads, max_context, head_dim]."""
        new = mb.expand_dims(x=_as("fp16", new), axes=[0])
        before = mb.read_state(input=self.inputs[state])
        if self.padded:
            kept = mb.slice_by_index(x=before, **window)
            new = mb.select(cond=self.real, a=new, b=mb.reshape(x=kept, shape=new.shape))
        after = mb.slice_update(x=before, update=new, **window)
        after = mb.coreml_update_state(state=self.inputs[state], value=after)
        whole = [1, *self.cache_shape[1:]]
        return self._activation(mb.slice_by_size(x=after, begin=[layer, 0, 0, 0], size=whole))

    def _rotate(self, x: Var) -> Var:
        """RoPE on x [steps, heads, head_dim]: in each pair of numbers (a, b) the turned one is
        (-b, a), which a product with a matrix of signs gives exactly."""
        turned = mb.matmul(x=x, y=self.turn)
        return mb.add(x=mb.mul(x=x, y=self.cos), y=mb.mul(x=turned, y=self.sin))

    def _norm(self, x: Var, name: str = "") -> Var:
        """RMS norm, with a weight if it has one. In float32: float16 squares overflow above 255."""
        wide = _as("fp32", x)
        mean = mb.reduce_mean(x=mb.square(x=wide), axes=[-1], keep_dims=True)
        root = mb.rsqrt(x=mean, epsilon=np.float32(self.config.rms_norm_eps))
        normal = mb.mul(x=wide, y=root)
        if name:
            normal = mb.mul(x=normal, y=self.constants.vector(name))
        return self._activation(normal)

    def _linear(self, x: Var, name: str) -> Var:
        """x times the transpose of a weight, in the weight's own type."""
        weight = self._matrix(name)
        kind = _kind(weight)
        bias = self._zeros(weight.shape[0], kind)
        return self._activation(mb.linear(x=_as(kind, x), weight=weight, bias=bias))

    def _matrix(self, name: str) -> Var:
        """A weight; the tied embedding is one for both its uses."""
        if name not in self._made:
            self._made[name] = self.constants.matrix(name)
        return self._made[name]

    def _zeros(self, width: int, kind: str) -> Var:
        """The bias of a layer without one, which each would otherwise store for itself."""
        name = f"zeros_{width}_{kind}"
        if name not in self._made:
            array = np.zeros(width, np.float16 if kind == "fp16" else np.float32)
            self._made[name] = self.constants.shared(name, array)
        return self._made[name]

    def _rows(self, x: Var, indices: Var, axis: int) -> Var:
        return mb.gather(x=x, indices=indices, axis=axis, validate_indices=False)

    def _activation(self, x: Var) -> Var:
        return _as(self.kind, x)

    def _number(self, value: float) -> Any:
        return self.constants.float_type(value)


def _kind(x: Var) -> str:
    kind: str = types.builtin_to_string(x.dtype)
    return kind


def _as(kind: str, x: Var) -> Var:
    return x if _kind(x) == kind else mb.cast(x=x, dtype=kind)


def _indices(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def _quarter_turn(config: ModelConfig) -> Tensor:
    """The matrix T [head_dim, head_dim] for which x T turns each pair that RoPE rotates."""
    size = config.head_dim
    pairs = (
        torch.arange(size).view(-1, 2)
        if config.rope_interleaved
        else torch.arange(size).view(2, -1).t()
    )
    turn = torch.zeros(size, size)
    turn[pairs[:, 1], pairs[:, 0]] = -1
    turn[pairs[:, 0], pairs[:, 1]] = 1
    return turn
