"""The program around the XNNPACK graphs: embedding, RoPE angles, KV cache and attention.

`attention` has the forms of the cache and of the attention. While torch exports the program, each
segment is one opaque operator. `delegate` then replaces it by a call of the delegate that holds its
graph.
"""

import operator
from collections.abc import Sequence
from typing import Any

import executorch.kernels.quantized  # noqa: F401  # registers the quantized kernels
import torch
from executorch.exir.delegate import executorch_call_delegate
from executorch.exir.lowered_backend_module import LoweredBackendModule
from executorch.exir.passes import _quant_patterns_and_replacements as _patterns  # noqa: F401
from torch import Tensor, nn

from exporter.backends.executorch import Target, longest_call
from exporter.backends.executorch.attention import Last, Step, attention_form
from exporter.backends.executorch.graph import stored_scales
from exporter.backends.executorch.schemes import TABLE
from exporter.backends.executorch.segments import Segment, Segments
from exporter.model.config import EMBEDDING
from exporter.model.rope import rope_frequencies
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint
from exporter.quantization.schemes import QuantizedTensor

#: Bits of the codes → the dtype that the embedding operator requires for its table.
_TABLE_TYPES = {4: torch.uint8, 8: torch.int8}

_library = torch.library.Library("mobilellm", "DEF")
_library.define(
    "segment(Tensor[] inputs, int hidden_states, int[] heads, int head_dim, int[] logits, "
    "int index) -> Tensor[]"
)
_SEGMENT = "mobilellm::segment"


@torch.library.register_fake(_SEGMENT, lib=_library)
def _segment(
    inputs: Sequence[Tensor],
    hidden_states: int,
    heads: Sequence[int],
    head_dim: int,
    logits: Sequence[int],
    index: int,
) -> Any:
    """The shapes of a segment's outputs.

    They are `hidden_states` tensors shaped like its first input, one tensor [1, seq, count,
    head_dim] for each count in `heads`, and logits of the size `logits`, in which -1 is seq,
    unless that is empty.
    """
    x = inputs[0]
    return [
        *(torch.empty_like(x) for _ in range(hidden_states)),
        *(x.new_empty(1, x.shape[1], count, head_dim) for count in heads),
        *([x.new_empty(*(x.shape[1] if n == -1 else n for n in logits))] if logits else []),
    ]


def rope_rows(positions: Tensor, frequencies: Tensor) -> list[Tensor]:
    """What `Segments` multiplies a head and its exchanged halves by, each [1, seq, 1, head_dim] for
    positions [seq]. Angles are computed as in `rope_tables`; a table would be 8 bytes for each
    number of a head and each position of the context.
    """
    angles = positions.to(torch.float32).reshape(1, -1, 1, 1) * frequencies
    cos, sin = angles.cos(), angles.sin()
    return [torch.cat((cos, cos), 3), torch.cat((-sin, sin), 3)]


class Program(nn.Module):
    """The part of the decoder outside XNNPACK: embedding, RoPE angles, KV cache, attention."""

    def __init__(
        self,
        quantized: QuantizedCheckpoint,
        target: Target,
        segments: Segments,
    ) -> None:
        super().__init__()
        self.config, self.context, self.segments = quantized.config, target.max_context, segments
        self.longest_call, self.logits = longest_call(target), target.logits
        self.attention = attention_form(self.config, target)
        self._add_embedding(quantized)
        self.register_buffer("frequencies", rope_frequencies(self.config))
        for layer in range(self.config.num_hidden_layers):
            empty = self.attention.buffers()
            self.cached = tuple(empty)
            for name, buffer in empty.items():
                self.register_buffer(f"{name}_{layer}", buffer)

    def forward(self, tokens: Tensor, start: Tensor) -> Tensor:
        """tokens [1, seq] from position start [1] on to the last token's logits [1, vocab_size].

        If the target's `logits` is not 1: [1, min(seq, logits), vocab_size].
        """
        length = tokens.shape[1]
        position = start[0].item()
        torch._check(position >= 0)
        torch._check(position + length <= self.context)
        positions = start + torch.arange(length)
        rows = rope_rows(positions, self.get_buffer("frequencies"))
        step = Step(position, positions, self.attention.mask(positions))
        last = self._last_positions(length)
        values = {self.segments.embedded: self._embed(tokens)}
        results = list[Tensor]()
        for segment in self.segments.segments:
            carried, attention = [values[value] for value in segment.carried], list[Tensor]()
            if segment.attended:
                q, k, v = results
                attention = self.attention.attend(self._cache(segment.index - 1), q, k, v, step)
            if segment.last_token:
                carried = [last(x, 1) for x in carried]
                attention = self.attention.last_token(attention, last)
            kept, results = self._call(
                segment, [*carried, *attention, *(rows if segment.rotates else [])]
            )
            values.update(zip(segment.kept, kept, strict=True))
        [logits] = results
        return logits

    def _last_positions(self, length: Any) -> Last:
        """The last of `length` positions, as many as have logits."""
        if self.logits == 1:
            return lambda x, dim: x[(slice(None),) * dim + (slice(-1, None),)]
        # The smaller of two numbers as the value of a tensor: torch.export cannot prove for
        # sym_min(length, logits) that it is at most the length.
        rows = torch.full((1,), length).clamp(max=self.logits).item()
        torch._check(rows >= 1)
        torch._check(rows <= self.logits)
        torch._check(rows <= length)
        return lambda x, dim: x.narrow(dim, length - rows, rows)  # type: ignore[arg-type]

    def _call(self, segment: Segment, inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Call a segment. Returns the hidden states for later segments, and its other results."""
        config, count = self.config, len(segment.kept)
        kv_heads = config.num_key_value_heads
        heads = [config.num_attention_heads, kv_heads, kv_heads]
        logits = [1, config.vocab_size] if self.logits == 1 else [1, -1, config.vocab_size]
        outputs = torch.ops.mobilellm.segment(
            inputs,
            count,
            heads if segment.queries_keys_values else [],
            config.head_dim,
            logits if segment.logits else [],
            segment.index,
        )
        return outputs[:count], outputs[count:]

    def _cache(self, layer: int) -> dict[str, Tensor]:
        """The buffers of a layer's cache by their names in `AttentionForm.buffers`."""
        return {name: self.get_buffer(f"{name}_{layer}") for name in self.cached}

    def _add_embedding(self, quantized: QuantizedCheckpoint) -> None:
        stored = quantized.read(EMBEDDING)
        if not isinstance(stored, QuantizedTensor):
            self.embedding_bits = None
            self.register_buffer("embedding", stored.to(torch.float32))
            return
        self.embedding_bits = stored.scheme.code_bits
        packed = TABLE.pack(stored.codes, self.embedding_bits)
        # The operator for int8 tables needs int8 codes, the one for int4 packed uint8.
        self.register_buffer("embedding", packed.view(_TABLE_TYPES[self.embedding_bits]))
        scales = stored_scales(stored)
        self.register_buffer("embedding_scales", scales[:, 0] if scales.shape[1] == 1 else scales)

    def _embed(self, tokens: Tensor) -> Tensor:
        table, ops = self.get_buffer("embedding"), torch.ops.quantized_decomposed
        if self.embedding_bits is None:
            return nn.functional.embedding(tokens, table)
        scales, dtype = self.get_buffer("embedding_scales"), torch.float32
        # The variant with a type of its own for the result takes scales of another type.
        if self.embedding_bits == 4:
            x: Tensor = ops.embedding_4bit(table, scales, None, -8, 7, tokens, dtype=dtype)
        else:
            x = ops.embedding_byte(table, scales, None, -128, 127, tokens, dtype=dtype)
        return x


def export_program(program: Program) -> torch.export.ExportedProgram:
    """Export the program for calls with 1 to `program.longest_call` tokens."""
    length = torch.export.Dim("length", min=1, max=program.longest_call)
    example = (torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    with torch.no_grad():
        return torch.export.export(
            program.eval(), example, dynamic_shapes=({1: length}, None), strict=False
        )


def delegate(exported: torch.export.ExportedProgram, segments: Segments) -> None:
    """Replace the operator of each segment by a call of its XNNPACK delegate."""
    module = exported.graph_module
    stand_ins: dict[str, torch.export.ExportedProgram] = {}
    for node in list(module.graph.nodes):
        if not _is_segment(node):
            continue
        inputs, *sizes, index = node.args
        key = repr((len(inputs), sizes))
        if key not in stand_ins:
            stand_ins[key] = _stand_in(node)
        payload = segments.graph(index).serialize()
        lowered = LoweredBackendModule(stand_ins[key], "XnnpackBackend", payload, [])
        name = f"lowered_module_{index}"
        module.add_module(name, lowered)
        with module.graph.inserting_before(node):
            attribute = module.graph.get_attr(name)
            call = module.graph.call_function(executorch_call_delegate, (attribute, *inputs), {})
            call.meta["val"] = list(node.meta["val"])
        node.replace_all_uses_with(call)
        module.graph.erase_node(node)
    module.recompile()


def _is_segment(node: torch.fx.Node) -> bool:
    if node.op != "call_function" or node.target is operator.getitem:
        return False
    name = getattr(node.target, "name", None)
    return (name() if callable(name) else str(node.target)).startswith(_SEGMENT)


class _StandIn(nn.Module):
    """A module with only a segment's operator, from which the delegate gets its shapes."""

    def __init__(self, sizes: Sequence[Any]) -> None:
        super().__init__()
        self.sizes = sizes

    def forward(self, *inputs: Tensor) -> Any:
        return torch.ops.mobilellm.segment(list(inputs), *self.sizes)


def _stand_in(node: torch.fx.Node) -> torch.export.ExportedProgram:
    inputs, *sizes = node.args
    assert isinstance(inputs, list)
    fakes = [given.meta["val"] for given in inputs if isinstance(given, torch.fx.Node)]
    dynamic = [
        {i: torch.export.Dim.DYNAMIC for i, s in enumerate(f.shape) if not isinstance(s, int)}
        for f in fakes
    ]
    example = tuple(
        torch.zeros([size if isinstance(size, int) else 3 for size in fake.shape]) for fake in fakes
    )
    return torch.export.export(
        _StandIn(sizes), example, dynamic_shapes={"inputs": tuple(dynamic)}, strict=False
    )
