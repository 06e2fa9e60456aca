"""The decoder as swift-transformers' ``LanguageModel`` calls it: one function over any number of
tokens. No Mac has run it.

The function reads ``inputIds`` [1, n] and ``causalMask`` [1, 1, rows, total] and gives ``logits``
[1, n, vocab_size] of every token. The tokens have the positions from total - n on. Keys and values
are in the states ``keyCache`` and ``valueCache`` [layers, 1, kv_heads, max_context, head_dim].

What its callers do with the mask differs, and the program is right for all of them:

- Python, as in the ``generate.py`` that swift-transformers brings: total is the number of tokens so
  far, and the mask [1, 1, n, total] is 0 or -inf.
- swift-transformers 1.3.3 (``Sources/Models/LanguageModel.swift``, line 546): a mask
  [1, 1, 1, total] of zeros, for a prompt of many tokens too, and total is the number of tokens so
  far plus one. So a token would see those after it, and position 0, where nothing was written.

So the program hides later tokens itself, adds what the mask hides, and hides position 0 if it is
empty: if the keys there in the first layer are all zero, as in a new state. A text that begins at
position 1 has the same logits, since RoPE is relative.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from exporter.backends.coreml import Target
from exporter.backends.coreml.constants import Constants
from exporter.backends.coreml.graph import MASKED_SCORE, Decoder, as_kind, ints
from exporter.backends.coreml.toolkit import Function, Var, coremltools, get_new_symbol, mb, types
from exporter.model.config import ModelConfig

#: The names that swift-transformers looks for (``LanguageModel.swift``, lines 137 to 149).
INPUT_IDS, CAUSAL_MASK = "inputIds", "causalMask"
KEY_CACHE, VALUE_CACHE = "keyCache", "valueCache"
#: The key of the metadata with the hub id of the tokenizer (``LanguageModel.swift``, line 229).
HUB_ID = "co.huggingface.exporters.name"
#: In a shape: as many as there are.
_ANY = -1


class LanguageModelDecoder(Decoder):
    """The function of the program. A call may read 1 to `max_context` tokens."""

    tokens, states = INPUT_IDS, (KEY_CACHE, VALUE_CACHE)

    def __init__(self, config: ModelConfig, target: Target, constants: Constants) -> None:
        super().__init__(config, target, constants, steps=_ANY)
        layers, *rest = self.cache_shape
        self.cache_shape = (layers, 1, *rest)

    def function(self) -> Function:
        function = super().function()
        # The ranges of the description. A package for Core ML has no unbounded ones.
        size = coremltools.RangeDim(1, self.target.max_context, default=1)
        shapes = {INPUT_IDS: (1, size), CAUSAL_MASK: (1, 1, size, size)}
        dtypes = {INPUT_IDS: np.int32, CAUSAL_MASK: np.float16}
        function.set_input_types(
            tuple(
                coremltools.TensorType(name, shape=coremltools.Shape(shape), dtype=dtypes[name])
                for name, shape in shapes.items()
            )
        )
        return function

    def _input_specs(self) -> dict[str, Any]:
        rows, total = get_new_symbol(), get_new_symbol()
        return {
            INPUT_IDS: mb.TensorSpec((1, get_new_symbol()), dtype=types.int32),
            CAUSAL_MASK: mb.TensorSpec((1, 1, rows, total), dtype=types.fp16),
        }

    def last_token(self, x: Var) -> Var:
        """Every token: the caller takes the logits that it needs."""
        return x

    def _prepare_positions(self) -> None:
        given = self.inputs[CAUSAL_MASK]
        steps, rows = _size(self.inputs[INPUT_IDS], 1), _size(given, 2)
        self.end = _size(given, 3)
        self.position = mb.sub(x=self.end, y=steps)
        positions = _range(self.position, self.end)
        self._prepare_rotation(positions)
        column = mb.expand_dims(x=_range(ints(0), self.end), axes=[0])
        hidden = mb.logical_or(
            x=mb.greater(x=column, y=mb.expand_dims(x=positions, axes=[1])),
            y=mb.less(x=column, y=self._first_column()),
        )
        own = mb.mul(x=as_kind(self.kind, hidden), y=self._number(MASKED_SCORE))
        # A row of the given mask for each token. A mask of one row is for all of them.
        row = mb.minimum(x=_range(ints(0), steps), y=mb.sub(x=rows, y=ints(1)))
        given = mb.squeeze(x=self._rows(given, row, axis=2), axes=[0, 1])
        # Not below the own mask: float16 has no sum of two lowest numbers, and no -inf is needed.
        given = mb.maximum(x=as_kind(self.kind, given), y=self._number(MASKED_SCORE))
        self.mask = self._for_groups(mb.minimum(x=own, y=given))

    def _first_column(self) -> Var:
        """The first position to which a token may attend, int32 [1]: 1 if nothing was written at
        position 0, nor will be in this call."""
        size = [1, 1, self.config.num_key_value_heads, 1, self.config.head_dim]
        keys = mb.read_state(input=self.inputs[KEY_CACHE])
        keys = mb.slice_by_size(x=keys, begin=[0, 0, 0, 0, 0], size=size)
        largest = mb.reduce_max(
            x=mb.abs(x=mb.reshape(x=keys, shape=[_ANY])), axes=[0], keep_dims=True
        )
        empty = mb.cast(x=mb.equal(x=largest, y=np.float16(0)), dtype="int32")
        return mb.mul(x=empty, y=mb.minimum(x=self.position, y=ints(1)))

    def _window(self, layer: int) -> Mapping[str, Any]:
        first, after = ints(layer, 0, 0), ints(layer + 1, 0, 0)
        return {
            "begin": mb.concat(values=[first, self.position, ints(0)], axis=0),
            "end": mb.concat(values=[after, self.end, ints(0)], axis=0),
            "end_mask": [False, True, True, False, True],
        }

    def _extend(self, state: str, new: Var, layer: int, window: Mapping[str, Any]) -> Var:
        """Write `new` [kv_heads, n, head_dim] into its window of a layer's cache.

        Returns the layer's cache up to the last token [1, kv_heads, total, head_dim].
        """
        new = mb.expand_dims(x=as_kind("fp16", new), axes=[0, 1])
        before = mb.read_state(input=self.inputs[state])
        after = mb.slice_update(x=before, update=new, **window)
        after = mb.coreml_update_state(state=self.inputs[state], value=after)
        filled = mb.slice_by_index(
            x=after,
            begin=ints(layer, 0, 0, 0, 0),
            end=window["end"],
            end_mask=window["end_mask"],
            squeeze_mask=[True, False, False, False, False],
        )
        return self._activation(filled)


def _size(x: Var, axis: int) -> Var:
    """A size of x at run time, int32 [1]."""
    return mb.slice_by_size(x=mb.shape(x=x), begin=[axis], size=[1])


def _range(start: Any, end: Var) -> Var:
    """The numbers from start to before end, int32 [end - start]. Both are int32 [1]."""
    first = np.int32(start[0]) if isinstance(start, np.ndarray) else mb.squeeze(x=start, axes=[0])
    return mb.range_1d(start=first, end=mb.squeeze(x=end, axes=[0]), step=np.int32(1))
