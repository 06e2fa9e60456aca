"""A function of the program: the operations of the walk as ML Program operations of iOS 18.

A function reads ``input_ids`` [1, steps] at positions from ``position`` [1] on. It keeps keys and
values in two states [layers, kv_heads, max_context, head_dim] and gives the logits of the last
token. With several steps, the first ``length`` [1] are text. The others are padding, which does not
enter the cache and to which no position attends.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from exporter.backends.coreml import Target
from exporter.backends.coreml.constants import Constants
from exporter.backends.coreml.toolkit import Function, Var, coremltools, mb, types
from exporter.model.config import ModelConfig
from exporter.model.rope import paired_rope_tables, quarter_turn
from exporter.model.walk import walk

KEYS, VALUES = "key_cache", "value_cache"
LOGITS, TOKEN = "logits", "token"
#: Added to the attention score of a masked position. float16 holds it exactly.
MASKED_SCORE = -10000.0
#: The smallest float16 with full precision.
_SMALLEST_NORMAL = 2.0**-14


@dataclass(frozen=True)
class _Product:
    """x times the transpose of a weight. The operation is not emitted yet."""

    x: Var
    weight: str


@dataclass(frozen=True)
class _Heads:
    """Queries, keys or values [1, steps, count * head_dim], not split into heads yet.

    `steps` are the operations to emit on the heads [steps, count, head_dim] after the split.
    """

    x: Var
    count: int
    steps: tuple[Callable[[Var], Var], ...] = ()

    def then(self, step: Callable[[Var], Var]) -> "_Heads":
        return replace(self, steps=(*self.steps, step))


class Decoder:
    """One function of the program, for CPU and GPU.

    Products and operations on heads are deferred. A product is emitted just before its first use,
    and the operations on queries and keys alternate. This order determines the program's bytes.
    """

    #: The input with the tokens, and the states with keys and values.
    tokens, states = "input_ids", (KEYS, VALUES)

    def __init__(
        self, config: ModelConfig, target: Target, constants: Constants, steps: int
    ) -> None:
        self.config, self.target, self.constants, self.steps = config, target, constants, steps
        self.kind = "fp16" if target.activations == "float16" else "fp32"
        self.padded = steps > 1
        self.cache_shape: tuple[int, ...] = (
            config.num_hidden_layers,
            config.num_key_value_heads,
            target.max_context,
            config.head_dim,
        )
        self._made = dict[str, Var]()  # constants that several operations share

    def function(self) -> Function:
        inputs = self._input_specs()
        for state in self.states:
            inputs[state] = mb.StateTensorSpec(self.cache_shape, dtype=types.fp16)
        with Function(inputs, opset_version=coremltools.target.iOS18) as function:
            self.inputs = function.inputs
            self._prepare_positions()
            function.set_outputs([self._outputs()])
        return function

    def _input_specs(self) -> dict[str, Any]:
        """The inputs by name, without the states."""
        inputs = {
            self.tokens: mb.TensorSpec((1, self.steps), dtype=types.int32),
            "position": mb.TensorSpec((1,), dtype=types.int32),
        }
        if self.padded:
            inputs["length"] = mb.TensorSpec((1,), dtype=types.int32)
        return inputs

    def _outputs(self) -> Var:
        """Logits of the last token [1, 1, vocab_size], or the most likely next token [1, 1]."""
        logits = walk(self.config, self)
        if self.target.output == LOGITS:
            return logits
        return mb.reduce_argmax(x=logits, axis=-1, keep_dims=False, name=TOKEN)

    def embed(self, weight: str) -> Var:
        rows = self._rows(self._matrix(weight), self.inputs[self.tokens], axis=0)
        return self._activation(rows)

    def linear(self, x: Var, *weights: str) -> list["_Product"]:
        return [_Product(x, weight) for weight in weights]

    def norm(self, x: Var, weight: str) -> Var:
        return self._norm(self._emitted(x), weight)

    def heads(self, x: Var, count: int) -> "_Heads":
        return _Heads(x, count)

    def norm_heads(self, x: "_Heads", weight: str | None) -> "_Heads":
        return x.then(lambda heads: self._norm(heads, weight))

    def rotate(self, x: "_Heads") -> "_Heads":
        return x.then(self._rotate)

    def last_token(self, x: Var) -> Var:
        return self._rows(x, self.last, axis=1) if self.padded else x

    def silu_product(self, gate: Var, up: Var) -> Var:
        return mb.mul(x=mb.silu(x=self._emitted(gate)), y=self._emitted(up))

    def add(self, x: Var, y: Var) -> Var:
        return mb.add(x=x, y=self._emitted(y))

    def output(self, x: Var, weight: str) -> Var:
        logits = self._linear(x, weight)
        logits.set_name(LOGITS)
        return logits

    def _emitted(self, x: Var) -> Var:
        """The value of x. Emits the operation of a deferred product."""
        return self._linear(x.x, x.weight) if isinstance(x, _Product) else x

    def _prepare_positions(self) -> None:
        """Emit what depends on the position only: RoPE rows, mask, and the window of the cache."""
        offsets = np.arange(self.steps, dtype=np.int32)
        positions = mb.add(x=self.inputs["position"], y=offsets)
        self._prepare_rotation(positions)
        column = np.arange(self.target.max_context, dtype=np.int32)[None]
        later = mb.greater(x=column, y=mb.expand_dims(x=positions, axes=[1]))
        masked = mb.mul(x=as_kind(self.kind, later), y=self._number(MASKED_SCORE))
        self.mask = self._for_groups(masked)
        if self.padded:
            self.last = mb.sub(x=self.inputs["length"], y=ints(1))
            # [steps, 1]: which rows of the chunk are text and not padding
            is_text = mb.less(x=offsets, y=self.inputs["length"])
            self.is_text = mb.expand_dims(x=is_text, axes=[1])
        self._prepare_writes(positions)

    def _prepare_rotation(self, positions: Var) -> None:
        """Emit the rows of RoPE's tables for `positions` [steps]."""
        config = self.config
        cos, sin = paired_rope_tables(config, self.target.max_context)
        # [steps, 1, head_dim]: the same for every head
        self.cos, self.sin = (
            mb.expand_dims(x=self._rows(self.constants.table(name, table), positions, 0), axes=[1])
            for name, table in (("rope_cos", cos), ("rope_sin", sin))
        )
        self.turn = self.constants.table("rope_turn", quarter_turn(config).t().contiguous())

    def _for_groups(self, mask: Var) -> Var:
        """A mask [steps, columns] with rows for every query head that shares a k/v head:
        [groups * steps, columns]."""
        groups = self.config.num_attention_heads // self.config.num_key_value_heads
        return mb.concat(values=[mask] * groups, axis=0) if groups > 1 else mask

    def _prepare_writes(self, positions: Var) -> None:
        """Emit what writing to the cache needs in every layer. `positions` is [steps]."""
        self.end = mb.add(x=self.inputs["position"], y=ints(self.steps))

    def attend(self, layer: int, q: "_Heads", k: "_Heads", v: "_Heads") -> Var:
        """Grouped-query attention over the cache, without the output projection."""
        config = self.config
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        groups, size = heads // kv_heads, config.head_dim
        steps = zip(q.steps, k.steps, strict=True)
        q, k, v = (
            mb.reshape(x=self._emitted(part.x), shape=[self.steps, part.count, size])
            for part in (q, k, v)
        )
        for step, same_step in steps:
            q, k = step(q), same_step(k)
        # The queries of a group are rows of one product, so that no key is repeated.
        q = mb.reshape(x=q, shape=[self.steps, kv_heads, groups, size])
        q = mb.transpose(x=q, perm=[1, 2, 0, 3])
        rows = groups * self.steps if self.steps > 0 else -1
        q = mb.reshape(x=q, shape=[1, kv_heads, rows, size])
        window = self._window(layer)
        keys, values = (
            self._extend(state, mb.transpose(x=new, perm=[1, 0, 2]), layer, window)
            for state, new in zip(self.states, (k, v), strict=True)
        )
        attended = self._weighted_values(q, keys, values)
        attended = mb.reshape(x=attended, shape=[kv_heads, groups, self.steps, size])
        attended = mb.transpose(x=attended, perm=[2, 0, 1, 3])
        return mb.reshape(x=attended, shape=[1, self.steps, heads * size])

    def _weighted_values(self, q: Var, keys: Var, values: Var) -> Var:
        """Attention [1, kv_heads, groups * steps, head_dim] of queries of the same shape."""
        return mb.scaled_dot_product_attention(query=q, key=keys, value=values, attn_mask=self.mask)

    def _window(self, layer: int) -> Mapping[str, Any]:
        """The positions of this call in a layer's cache, as a slice of a state."""
        first, after = ints(layer, 0), ints(layer + 1, 0)
        return {
            "begin": mb.concat(values=[first, self.inputs["position"], ints(0)], axis=0),
            "end": mb.concat(values=[after, self.end, ints(0)], axis=0),
            "end_mask": [False, True, False, True],
        }

    def _extend(self, state: str, new: Var, layer: int, window: Mapping[str, Any]) -> Var:
        """Write `new` [kv_heads, steps, head_dim] into its window of a layer's cache.

        Returns the layer's whole cache [1, kv_heads, max_context, head_dim].
        """
        new = mb.expand_dims(x=as_kind("fp16", new), axes=[0])
        before = mb.read_state(input=self.inputs[state])
        if self.padded:
            kept = mb.slice_by_index(x=before, **window)
            new = mb.select(cond=self.is_text, a=new, b=mb.reshape(x=kept, shape=new.shape))
        after = mb.slice_update(x=before, update=new, **window)
        after = mb.coreml_update_state(state=self.inputs[state], value=after)
        return self._activation(self._layer(after, layer))

    def _layer(self, cache: Var, layer: int) -> Var:
        """A layer [1, kv_heads, max_context, head_dim] of a whole cache."""
        size = [1, *self.cache_shape[1:]]
        return mb.slice_by_size(x=cache, begin=[layer, 0, 0, 0], size=size)

    def _rotate(self, x: Var) -> Var:
        """RoPE on x [steps, heads, head_dim]. The product with `quarter_turn` is exact: it only
        moves numbers and changes signs."""
        turned = mb.matmul(x=x, y=self.turn)
        return mb.add(x=mb.mul(x=x, y=self.cos), y=mb.mul(x=turned, y=self.sin))

    def _norm(self, x: Var, name: str | None) -> Var:
        """RMS norm, with a weight if `name` is given."""
        normal = self._normal_in_half(x) if self.kind == "fp16" else self._normal(x)
        if name:
            normal = mb.mul(x=normal, y=self._activation(self.constants.vector(name)))
        return normal

    def _normal(self, x: Var) -> Var:
        mean = mb.reduce_mean(x=mb.square(x=x), axes=[-1], keep_dims=True)
        return mb.mul(x=x, y=mb.rsqrt(x=mean, epsilon=np.float32(self.config.rms_norm_eps)))

    def _normal_in_half(self, x: Var) -> Var:
        """x / sqrt(mean(x²) + eps) with every step in float16, which overflows at 256².

        Casts to float32 would not help: lowerings to the Neural Engine drop them (reported in
        pytorch/executorch 19523), and it runs no float32 (apple/coremltools 2585). So x is divided
        by ``m = max(|x|, sqrt(eps))`` first: x / m / sqrt(mean((x / m)²) + (sqrt(eps) / m)²). Both
        terms of the sum are at most 1, and one of them is at least 1 / hidden_size. The eps is
        divided too, or large activations would have a larger one (apple/coremltools 2821).
        """
        root = math.sqrt(self.config.rms_norm_eps)
        largest = mb.reduce_max(x=mb.abs(x=x), axes=[-1], keep_dims=True)
        unit = mb.maximum(x=largest, y=np.float16(max(root, _SMALLEST_NORMAL)))
        scaled = mb.real_div(x=x, y=unit)
        mean = mb.reduce_mean(x=mb.square(x=scaled), axes=[-1], keep_dims=True)
        share = mb.square(x=mb.real_div(x=np.float16(root), y=unit))
        inverse = mb.rsqrt(x=mb.add(x=mean, y=share), epsilon=np.float16(0))
        return mb.mul(x=scaled, y=inverse)

    def _linear(self, x: Var, name: str) -> Var:
        """x times the transpose of a weight, computed in the weight's type."""
        weight = self._matrix(name)
        kind = _kind(weight)
        bias = self._zeros(weight.shape[0], kind)
        return self._activation(mb.linear(x=as_kind(kind, x), weight=weight, bias=bias))

    def _matrix(self, name: str) -> Var:
        """A weight. A tied embedding is one constant for both its uses."""
        if name not in self._made:
            self._made[name] = self.constants.matrix(name)
        return self._made[name]

    def _zeros(self, width: int, kind: str) -> Var:
        """The zero bias of linear layers. Without it, each layer would store one of its own."""
        name = f"zeros_{width}_{kind}"
        if name not in self._made:
            array = np.zeros(width, np.float16 if kind == "fp16" else np.float32)
            self._made[name] = self.constants.shared(name, array)
        return self._made[name]

    def _rows(self, x: Var, indices: Var, axis: int) -> Var:
        return mb.gather(x=x, indices=indices, axis=axis, validate_indices=False)

    def _activation(self, x: Var) -> Var:
        return as_kind(self.kind, x)

    def _number(self, value: float) -> Any:
        return self.constants.float_type(value)


def _kind(x: Var) -> str:
    kind: str = types.builtin_to_string(x.dtype)
    return kind


def as_kind(kind: str, x: Var) -> Var:
    """x in a float type such as fp16. A cast is emitted only if it has another type."""
    return x if _kind(x) == kind else mb.cast(x=x, dtype=kind)


def ints(*values: int) -> np.ndarray:
    """A constant vector of int32."""
    return np.array(values, np.int32)
