"""The program around the XNNPACK graphs: embedding, RoPE rows, cache and attention.

Each graph of `executorch_layers` is one opaque operator while torch exports the program, and is
then replaced by a call of the delegate that holds it.
"""

import operator
from collections.abc import Sequence
from typing import Any

import executorch.kernels.quantized  # noqa: F401  # registers the quantized kernels
import torch
from executorch.exir.delegate import executorch_call_delegate
from executorch.exir.lowered_backend_module import LoweredBackendModule
from executorch.exir.passes import _quant_patterns_and_replacements as _patterns  # noqa: F401
from executorch.extension.llm.custom_ops import custom_ops as _custom_ops  # noqa: F401
from torch import Tensor, nn

from exporter.backends.executorch import Target
from exporter.backends.executorch.layers import LayerGraphs
from exporter.model.decoder import rope_tables
from exporter.quantization.quantized_checkpoint import EMBEDDING, QuantizedCheckpoint
from exporter.quantization.schemes import QuantizedTensor

#: Added to the scores of positions that a token must not see.
_HIDDEN = -1e9

_library = torch.library.Library("mobilellm", "DEF")
_library.define(
    "enter(Tensor x, Tensor cos, Tensor sin, int heads, int kv_heads, int layer) -> Tensor[]"
)
_library.define(
    "cross(Tensor x, Tensor[] attention, Tensor cos, Tensor sin, int heads, int kv_heads, "
    "int layer) -> Tensor[]"
)
_library.define("leave(Tensor x, Tensor[] attention, int vocab_size, int layer) -> Tensor[]")


def _heads(x: Tensor, cos: Tensor, heads: int, kv_heads: int) -> list[Tensor]:
    return [x.new_empty(1, x.shape[1], n, cos.shape[-1]) for n in (heads, kv_heads, kv_heads)]


@torch.library.register_fake("mobilellm::enter", lib=_library)
def _enter(x: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, layer: int) -> Any:
    return _heads(x, cos, heads, kv_heads)


@torch.library.register_fake("mobilellm::cross", lib=_library)
def _cross(
    x: Tensor,
    attention: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    heads: int,
    kv_heads: int,
    layer: int,
) -> Any:
    return [torch.empty_like(x), *_heads(x, cos, heads, kv_heads)]


@torch.library.register_fake("mobilellm::leave", lib=_library)
def _leave(x: Tensor, attention: Sequence[Tensor], vocab_size: int, layer: int) -> Any:
    return [x.new_empty(1, vocab_size)]


class Program(nn.Module):
    """What runs outside XNNPACK: embedding, RoPE rows, cache and, as one operator, attention."""

    def __init__(self, quantized: QuantizedCheckpoint, target: Target) -> None:
        super().__init__()
        self.config, self.context = quantized.config, target.max_context
        self.portable = target.attention == "portable"
        self._add_embedding(quantized)
        cos, sin = rope_tables(self.config, self.context)
        # Both columns of a rotated pair carry the pair's angle.
        for name, table in (("cos", cos), ("sin", sin)):
            wide = (
                table.repeat_interleave(2, 1)
                if self.config.rope_interleaved
                else (table.repeat(1, 2))
            )
            self.register_buffer(name, wide)
        kv_heads, head_dim = self.config.num_key_value_heads, self.config.head_dim
        for layer in range(self.config.num_hidden_layers):
            in_order = (1, self.context, kv_heads, head_dim)
            size = (kv_heads, self.context, head_dim) if self.portable else in_order
            self.register_buffer(f"keys_{layer}", torch.zeros(size))
            self.register_buffer(f"values_{layer}", torch.zeros(size))

    def forward(self, tokens: Tensor, start: Tensor) -> Tensor:
        """tokens [1, seq] from position start [1] to the last token's logits [1, vocab_size]."""
        config, length = self.config, tokens.shape[1]
        position = start[0].item()
        torch._check(position >= 0)
        torch._check(position + length <= self.context)
        sizes = (config.num_attention_heads, config.num_key_value_heads)
        shape = (1, -1, 1, config.head_dim)
        cos = self.get_buffer("cos").narrow(0, position, length).view(shape)  # type: ignore[arg-type]
        sin = self.get_buffer("sin").narrow(0, position, length).view(shape)  # type: ignore[arg-type]
        positions = start + torch.arange(length)
        hidden = self._mask(positions) if self.portable else tokens
        ops = torch.ops.mobilellm
        x = self._embed(tokens)
        q, k, v = ops.enter(x, cos, sin, *sizes, 0)
        for layer in range(1, config.num_hidden_layers):
            attention = self._attend(layer - 1, q, k, v, position, positions, hidden)
            x, q, k, v = ops.cross(x, attention, cos, sin, *sizes, layer)
        last = config.num_hidden_layers - 1
        attention = self._attend(last, q, k, v, position, positions, hidden)
        # Nothing after the last attention looks at another position.
        if not self.portable:
            x, attention = x[:, -1:], [attention[0][:, -1:]]
        else:
            x, attention[0], attention[3] = x[:, -1:], q[:, -1:], hidden[:, :, -1:]
        logits: Tensor = ops.leave(x, attention, config.vocab_size, last)[0]
        return logits

    def _attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        position: Any,
        positions: Tensor,
        hidden: Tensor,
    ) -> list[Tensor]:
        """Update the cache; what the next XNNPACK call needs to know of the attention."""
        keys, values = self.get_buffer(f"keys_{layer}"), self.get_buffer(f"values_{layer}")
        if self.portable:
            # Not `keys[:, positions] = ...`, which would drop a leading dimension of one: the
            # runtime's index_put_ wants values of the cache's own rank.
            torch.ops.aten.index_put_(keys, (None, positions), k[0].transpose(0, 1))
            torch.ops.aten.index_put_(values, (None, positions), v[0].transpose(0, 1))
            return [q, keys, values, hidden]
        ops = torch.ops.llama
        ops.update_cache(k, keys, position)
        ops.update_cache(v, values, position)
        return [ops.custom_sdpa(q, keys, values, position, None, 0.0, True)]

    def _mask(self, positions: Tensor) -> Tensor:
        """[1, 1, seq, context]: 0 where a token may look, a large negative number elsewhere."""
        later = torch.arange(self.context)[None] > positions[:, None]
        return (later.to(torch.float32) * _HIDDEN)[None, None]

    def _add_embedding(self, quantized: QuantizedCheckpoint) -> None:
        stored = quantized.read(EMBEDDING)
        if not isinstance(stored, QuantizedTensor):
            self.embedding_bits = None
            self.register_buffer("embedding", stored.to(torch.float32))
            return
        self.embedding_bits = stored.scheme.bits
        codes = stored.codes
        if stored.scheme.bits == 4:  # the kernel reads the high nibble first, codes plus 8
            unsigned = (codes + 8).view(torch.uint8)
            codes = unsigned[:, 0::2] << 4 | unsigned[:, 1::2]
        self.register_buffer("embedding", codes)
        by_row = stored.scales.shape[1] == 1
        self.register_buffer("embedding_scales", stored.scales[:, 0] if by_row else stored.scales)

    def _embed(self, tokens: Tensor) -> Tensor:
        table, ops = self.get_buffer("embedding"), torch.ops.quantized_decomposed
        if self.embedding_bits is None:
            return nn.functional.embedding(tokens, table)
        scales = self.get_buffer("embedding_scales")
        if self.embedding_bits == 4:
            x: Tensor = ops.embedding_4bit(table, scales, None, -8, 7, tokens)
        else:
            x = ops.embedding_byte(table, scales, None, -128, 127, tokens)
        return x


def export_program(program: Program) -> torch.export.ExportedProgram:
    length = torch.export.Dim("length", min=1, max=program.context)
    example = (torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    with torch.no_grad():
        return torch.export.export(
            program.eval(), example, dynamic_shapes=({1: length}, None), strict=False
        )


def delegate(exported: torch.export.ExportedProgram, graphs: LayerGraphs) -> None:
    """Replace each opaque operator by a call of its XNNPACK delegate."""
    module = exported.graph_module
    stand_ins: dict[tuple[str, int], torch.export.ExportedProgram] = {}
    for node in list(module.graph.nodes):
        kind = _segment_kind(node)
        if kind is None:
            continue
        layer = node.args[-1]
        inputs = [a for arg in node.args for a in (arg if isinstance(arg, list) else [arg])]
        inputs = [value for value in inputs if isinstance(value, torch.fx.Node)]
        key = kind, len(inputs)
        if key not in stand_ins:
            stand_ins[key] = _stand_in(node)
        graph = graphs.graph(kind, layer)
        lowered = LoweredBackendModule(stand_ins[key], "XnnpackBackend", graph.serialize(), [])
        name = f"lowered_module_{layer}_{kind}"
        module.add_module(name, lowered)
        with module.graph.inserting_before(node):
            attribute = module.graph.get_attr(name)
            call = module.graph.call_function(executorch_call_delegate, (attribute, *inputs), {})
            call.meta["val"] = list(node.meta["val"])
        node.replace_all_uses_with(call)
        module.graph.erase_node(node)
    module.recompile()


def _segment_kind(node: torch.fx.Node) -> str | None:
    if node.op != "call_function" or node.target is operator.getitem:
        return None
    name = getattr(node.target, "name", None)
    full = name() if callable(name) else str(node.target)
    return full.split("::")[1].split(".")[0] if full.startswith("mobilellm::") else None


class _StandIn(nn.Module):
    """The opaque operator alone: what the delegate's shapes are worked out from."""

    def __init__(self, node: torch.fx.Node) -> None:
        super().__init__()
        kind = _segment_kind(node)
        assert kind is not None
        self.operator = getattr(torch.ops.mobilellm, kind)
        self.arguments = node.args

    def forward(self, *inputs: Tensor) -> Any:
        given = iter(inputs)

        def fill(argument: Any) -> Any:
            if isinstance(argument, (list, tuple)):
                return [fill(item) for item in argument]
            return next(given) if isinstance(argument, torch.fx.Node) else argument

        return self.operator(*(fill(argument) for argument in self.arguments))


def _stand_in(node: torch.fx.Node) -> torch.export.ExportedProgram:
    flat = [a for arg in node.args for a in (arg if isinstance(arg, list) else [arg])]
    fakes = [a.meta["val"] for a in flat if isinstance(a, torch.fx.Node)]
    dynamic = [
        {i: torch.export.Dim.DYNAMIC for i, s in enumerate(f.shape) if not isinstance(s, int)}
        for f in fakes
    ]
    example = tuple(
        torch.zeros([size if isinstance(size, int) else 3 for size in fake.shape]) for fake in fakes
    )
    return torch.export.export(
        _StandIn(node), example, dynamic_shapes={"inputs": tuple(dynamic)}, strict=False
    )
