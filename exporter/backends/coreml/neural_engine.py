"""A function of the program in a form for the Neural Engine. It was not run on hardware.

Every operation is in float16, with forms that float16 holds. The form answers these reports:

- int in blocks is computed wrongly there, palettes and one scale a row are not
  (apple/coreai-models 279, apple/coremltools 2716): int4 weights are palettes (see `palette`).
  The palettes hold the scales, since a scale apart from them is refused (apple/coremltools 2688).
- A slice update of a state at a run-time index crashes its compiler, constant indices do not
  (apple/coreai-torch 6): a call writes the whole cache of a layer, with masks.
- A state fails with 128 new positions and runs with 16 to 32 (apple/coremltools 2553,
  Anemll/Anemll 27): `prefill` is at most 32.
- A state fails if its last dimension is not a multiple of 32 (apple/coremltools 2631).
- A transpose before a state fails (apple/coremltools 2278): the last operation before the state
  is a sum.
- Its functions of exp(x) overflow without notice (apple/coremltools 2687, 2690): SiLU uses the
  sigmoid, which is between 0 and 1. Attention scales the queries before the product.
- The fused attention crashes on some devices (FluidInference/mobius 14): it is three operations.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from exporter.backends.coreml.graph import Decoder
from exporter.backends.coreml.toolkit import Var, mb


class NeuralEngineDecoder(Decoder):
    """One function of the program, for the Neural Engine. Activations are float16."""

    def silu_product(self, gate: Var, up: Var) -> Var:
        gate = self._emitted(gate)
        silu = mb.mul(x=gate, y=mb.sigmoid(x=gate))
        return mb.mul(x=silu, y=self._emitted(up))

    def _prepare_writes(self, positions: Var) -> None:
        """Emit two masks: ``placed`` [max_context, steps] is 1 where a row of the cache takes a
        token of this call, and ``kept`` [max_context, 1] is 1 where it takes none."""
        rows = np.arange(self.target.max_context, dtype=np.int32)[:, None]
        here = mb.equal(x=rows, y=mb.expand_dims(x=positions, axes=[0]))
        self.placed = mb.cast(x=here, dtype="fp16")
        if self.padded:
            is_text = mb.reshape(x=mb.cast(x=self.is_text, dtype="fp16"), shape=[1, self.steps])
            self.placed = mb.mul(x=self.placed, y=is_text)
        taken = mb.reduce_sum(x=self.placed, axes=[1], keep_dims=True)
        self.kept = mb.sub(x=np.float16(1), y=taken)

    def _window(self, layer: int) -> Mapping[str, Any]:
        """The whole cache of a layer."""
        after = [layer + 1, *self.cache_shape[1:]]
        return {"begin": [layer, 0, 0, 0], "end": after}

    def _extend(self, state: str, new: Var, layer: int, window: Mapping[str, Any]) -> Var:
        before = mb.read_state(input=self.inputs[state])
        # Exact: each sum has one term that is not zero.
        new = mb.matmul(x=mb.expand_dims(x=self.placed, axes=[0]), y=new)
        new = mb.expand_dims(x=new, axes=[0])
        cache = mb.add(x=mb.mul(x=self._layer(before, layer), y=self.kept), y=new)
        after = mb.slice_update(x=before, update=cache, **window)
        mb.coreml_update_state(state=self.inputs[state], value=after)
        return cache

    def _weighted_values(self, q: Var, keys: Var, values: Var) -> Var:
        q = mb.mul(x=q, y=np.float16(self.config.head_dim**-0.5))
        scores = mb.add(x=mb.matmul(x=q, y=keys, transpose_y=True), y=self.mask)
        return mb.matmul(x=mb.softmax(x=scores, axis=-1), y=values)
