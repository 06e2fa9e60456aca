"""ExecuTorch: a .pte that XNNPACK runs, with the waist's codes and scales untouched.

    mobilellm lower build/nano-int4 --target executorch -o build/nano

The program is small: an embedding, and between two attentions one XNNPACK call that holds all
the rest of a layer. Each such call is one opaque operator while the program is exported, and is
then replaced by the delegate that `executorch_graph` wrote for it.
"""

import contextlib
import io
import logging
import operator
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for _name in ("torch", "torchao"):
        logging.getLogger(_name).setLevel(logging.ERROR)
    import executorch.exir as exir
    import executorch.kernels.quantized  # noqa: F401  # registers the quantized kernels
    from executorch.exir._serialize import _program as pte
    from executorch.exir._serialize._named_data_store import NamedDataStore
    from executorch.exir.delegate import executorch_call_delegate
    from executorch.exir.lowered_backend_module import LoweredBackendModule
    from executorch.exir.passes import MemoryPlanningPass
    from executorch.exir.passes import _quant_patterns_and_replacements as _  # noqa: F401
    from executorch.exir.schema import DataSegment
    from executorch.extension.llm.custom_ops import custom_ops as _custom_ops  # noqa: F401
    from executorch.extension.pybindings import portable_lib

from exporter.backends import Artifact, Limits
from exporter.backends.executorch_graph import INFERRED, XnnpackGraph, decode_filter
from exporter.errors import InputError
from exporter.files import replacing
from exporter.model import ModelConfig, rope_tables
from exporter.quantization.integers import QuantizedTensor, Scheme
from exporter.quantization.waist import EMBEDDING, OUTPUT, QuantizedCheckpoint
from exporter.recipe import ExecuTorchTarget

FILE_NAME = "model.pte"
PACKAGES = ("executorch", "torch")
LIMITS = Limits(int8_activations=True, kl=2e-3, top1=0.97, difference=0.5)
_ALIGNMENT = 128
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


def check(config: ModelConfig, schemes: Mapping[str, Scheme], target: ExecuTorchTarget) -> None:
    """Refuse what XNNPACK or the model cannot do. Raises InputError."""
    if target.max_context > config.max_position_embeddings:
        raise InputError(
            "max_context",
            f"{target.max_context} is more than the model's {config.max_position_embeddings}",
            "Lower max_context",
        )
    for name, scheme in schemes.items():
        multiplied = name != EMBEDDING or config.tie_word_embeddings
        if multiplied and scheme.bits == 8 and scheme.group_size:
            raise InputError(
                f"{name}: {scheme}",
                "XNNPACK multiplies int8 weights with one scale a row only",
                "Use int8, or an int4 scheme",
            )


def lower(waist: QuantizedCheckpoint, target: ExecuTorchTarget, out: Path) -> Artifact:
    """Write `out`/model.pte."""
    check(waist.config, waist.schemes, target)
    with _quietly():
        exported = _export(_Program(waist, target))
        edge = exir.to_edge(
            exported,
            constant_methods=_constant_methods(waist, target),
            compile_config=exir.EdgeCompileConfig(_check_ir_validity=False),
        )
        segments = _Segments(waist, target)
        _delegate(edge.exported_program(), segments)
        edge._named_data_store.merge_named_data_store(
            segments.named_data.get_named_data_store_output()
        )
        manager = edge.to_executorch(
            exir.ExecutorchBackendConfig(
                run_reinplace_pass=True,
                memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
            )
        )
        buffer = io.BytesIO()
        manager.write_to_file(buffer)
    with replacing(out / FILE_NAME) as file:
        for part in _store_embedding_once(buffer.getbuffer()):
            file.write(part)
    return Artifact(out, target)


def _constant_methods(waist: QuantizedCheckpoint, target: ExecuTorchTarget) -> dict[str, Any]:
    """What the official runners ask the program (extension/llm/runner/constants.h)."""
    text_ends = waist.eos_token_ids
    return {
        "enable_dynamic_shape": True,
        "get_max_context_len": target.max_context,
        "get_max_seq_len": target.max_context,
        "get_vocab_size": waist.config.vocab_size,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": target.attention == "custom_sdpa",
        **({"get_bos_id": waist.bos_token_id} if waist.bos_token_id is not None else {}),
        **({"get_eos_ids": list(text_ends)} if text_ends else {}),
    }


class _Program(nn.Module):
    """What runs outside XNNPACK: embedding, RoPE rows, cache and, as one operator, attention."""

    def __init__(self, waist: QuantizedCheckpoint, target: ExecuTorchTarget) -> None:
        super().__init__()
        self.config, self.context = waist.config, target.max_context
        self.portable = target.attention == "portable"
        self._add_embedding(waist)
        cos, sin = rope_tables(self.config, self.context)
        # Both columns of a rotated pair carry the pair's angle.
        for name, table in (("cos", cos), ("sin", sin)):
            wide = table.repeat_interleave(2, 1) if self.config.rope_interleaved else (
                table.repeat(1, 2)
            )
            self.register_buffer(name, wide)
        kv_heads, head_dim = self.config.num_key_value_heads, self.config.head_dim
        for layer in range(self.config.num_hidden_layers):
            size = (1, self.context, kv_heads, head_dim)
            if self.portable:
                size = (kv_heads, self.context, head_dim)
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

    def _add_embedding(self, waist: QuantizedCheckpoint) -> None:
        stored = waist.read(EMBEDDING)
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


def _export(program: _Program) -> torch.export.ExportedProgram:
    length = torch.export.Dim("length", min=1, max=program.context)
    example = (torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    with torch.no_grad():
        return torch.export.export(
            program.eval(), example, dynamic_shapes=({1: length}, None), strict=False
        )


class _Segments:
    """The XNNPACK graph of each opaque operator, from the waist's tensors."""

    def __init__(self, waist: QuantizedCheckpoint, target: ExecuTorchTarget) -> None:
        self.waist, self.config, self.context = waist, waist.config, target.max_context
        self.portable = target.attention == "portable"
        self.named_data = NamedDataStore()

    def graph(self, kind: str, layer: int) -> XnnpackGraph:
        """`enter` opens layer 0; `cross` closes layer - 1 and opens `layer`; `leave` closes."""
        graph, config = XnnpackGraph(self.named_data), self.config
        length = 1 if kind == "leave" else self.context
        x = graph.input(1, length, config.hidden_size)
        attention = self._attention_inputs(graph, length) if kind != "enter" else []
        if kind == "leave":
            x = self._close_layer(graph, x, attention, layer)
            graph.output(self._output_layer(graph, x))
            return graph
        cos = graph.input(1, length, 1, config.head_dim)
        sin = graph.input(1, length, 1, config.head_dim)
        if kind == "cross":
            x = self._close_layer(graph, x, attention, layer - 1)
            graph.output(x)
        for value in self._open_layer(graph, x, cos, sin, layer):
            graph.output(value)
        return graph

    def _open_layer(self, g: XnnpackGraph, x: int, cos: int, sin: int, layer: int) -> list[int]:
        """The layer's q, k and v, each [1, seq, heads, head_dim], rotated and normalized."""
        config, prefix = self.config, f"model.layers.{layer}"
        normal = self._norm(g, x, f"{prefix}.input_layernorm.weight")
        names = [f"{prefix}.self_attn.{p}_proj.weight" for p in "qkv"]
        q, k, v = self._linear(g, normal, *names)
        heads = config.num_attention_heads, config.num_key_value_heads
        q, k = (
            self._rotate(g, g.reshape(value, 1, INFERRED, n, config.head_dim), cos, sin)
            for value, n in zip((q, k), heads, strict=True)
        )
        return [q, k, g.reshape(v, 1, INFERRED, heads[1], config.head_dim)]

    def _rotate(self, g: XnnpackGraph, x: int, cos: int, sin: int) -> int:
        """RoPE as x * cos + (x R) * sin, R being the quarter turn of every pair."""
        turned = g.linear(x, g.constant("rope.quarter_turn", quarter_turn(self.config)))
        x = g.add(g.multiply(x, cos), g.multiply(turned, sin))
        return self._normalize(g, x, self.config.head_dim) if self.config.use_qk_norm else x

    def _close_layer(self, g: XnnpackGraph, x: int, attention: list[int], layer: int) -> int:
        config, prefix = self.config, f"model.layers.{layer}"
        width = config.num_attention_heads * config.head_dim
        attended = self._portable_attention(g, *attention) if self.portable else attention[0]
        attended = g.reshape(attended, 1, INFERRED, width)
        x = g.add(x, self._linear(g, attended, f"{prefix}.self_attn.o_proj.weight")[0])
        normal = self._norm(g, x, f"{prefix}.post_attention_layernorm.weight")
        mlp = f"{prefix}.{config.mlp_name}"
        gate, up = self._linear(g, normal, f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight")
        inner = g.multiply(g.multiply(gate, g.sigmoid(gate)), up)
        return g.add(x, self._linear(g, inner, f"{mlp}.down_proj.weight")[0])

    def _output_layer(self, g: XnnpackGraph, x: int) -> int:
        config = self.config
        x = self._norm(g, x, "model.norm.weight")
        if not config.tie_word_embeddings:
            return g.reshape(self._linear(g, x, OUTPUT)[0], 1, config.vocab_size)
        tied = self.waist.read(EMBEDDING)
        if isinstance(tied, QuantizedTensor) and tied.scheme.bits == 4:
            # The embedding kernel reads nibbles in the other order than XNNPACK. With every two
            # neighbouring columns exchanged both read the same bytes, which are stored once.
            swap = g.constant("output.exchange", torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
            pairs = g.linear(g.reshape(x, 1, 1, config.hidden_size // 2, 2), swap)
            x = g.reshape(pairs, 1, 1, config.hidden_size)
            tied = QuantizedTensor(_exchange_columns(tied.codes), tied.scales, tied.scheme)
        logits = self._multiply_by(g, x, {EMBEDDING: tied})[0]
        return g.reshape(logits, 1, config.vocab_size)

    def _linear(self, g: XnnpackGraph, x: int, *names: str) -> list[int]:
        return self._multiply_by(g, x, {name: self.waist.read(name) for name in names})

    def _multiply_by(
        self, g: XnnpackGraph, x: int, weights: dict[str, QuantizedTensor | Tensor]
    ) -> list[int]:
        """x times each weight; the quantized ones share one quantization of x."""
        quantized = None
        results = []
        for name, weight in weights.items():
            if isinstance(weight, QuantizedTensor):
                quantized = g.quantize(x) if quantized is None else quantized
                results.append(g.linear(quantized, g.weight(name, weight)))
            else:
                results.append(g.linear(x, g.constant(name, weight)))
        return results

    def _norm(self, g: XnnpackGraph, x: int, name: str) -> int:
        normal = self._normalize(g, x, self.config.hidden_size)
        return g.multiply(normal, g.constant(name, self.waist.float_weight(name)))

    def _normalize(self, g: XnnpackGraph, x: int, width: int) -> int:
        """x over its root mean square; the mean is a product with a row of 1 / width."""
        row = g.constant(f"norm.mean_{width}", torch.full((1, width), 1 / width))
        eps = g.constant("norm.eps", torch.tensor([self.config.rms_norm_eps]))
        mean = g.linear(g.multiply(x, x), row)
        return g.multiply(x, g.reciprocal_square_root(g.add(mean, eps)))

    def _attention_inputs(self, g: XnnpackGraph, length: int) -> list[int]:
        config, context = self.config, self.context
        q = g.input(1, length, config.num_attention_heads, config.head_dim)
        if not self.portable:
            return [q]
        kv_heads = config.num_key_value_heads
        keys = g.input(kv_heads, context, config.head_dim)
        values = g.input(kv_heads, context, config.head_dim)
        return [q, keys, values, g.input(1, 1, length, context)]

    def _portable_attention(
        self, g: XnnpackGraph, q: int, keys: int, values: int, mask: int
    ) -> int:
        """Attention over the whole cache; the heads of one k/v head are stacked as rows."""
        config = self.config
        kv_heads, head_dim = config.num_key_value_heads, config.head_dim
        group = config.num_attention_heads // kv_heads
        scale = g.constant("attention.scale", torch.tensor([head_dim**-0.5]))
        q = g.reshape(g.multiply(q, scale), INFERRED, kv_heads, group, head_dim)
        q = g.reshape(g.transpose(q, 1, 2, 0, 3), kv_heads, INFERRED, head_dim)
        scores = g.reshape(g.matmul_transposed(q, keys), kv_heads, group, INFERRED, self.context)
        shares = g.reshape(g.softmax(g.add(scores, mask)), kv_heads, INFERRED, self.context)
        mixed = g.reshape(g.matmul(shares, values), kv_heads, group, INFERRED, head_dim)
        return g.transpose(mixed, 2, 0, 1, 3)


def quarter_turn(config: ModelConfig) -> Tensor:
    """R [head_dim, head_dim] of x R^T: the pair (a, b) becomes (-b, a)."""
    size = config.head_dim
    first = torch.arange(0, size, 2) if config.rope_interleaved else torch.arange(size // 2)
    second = first + (1 if config.rope_interleaved else size // 2)
    turn = torch.zeros(size, size)
    turn[first, second] = -1
    turn[second, first] = 1
    return turn


def _exchange_columns(codes: Tensor) -> Tensor:
    return codes.unflatten(1, (-1, 2)).flip(-1).flatten(1).contiguous()


def _delegate(exported: torch.export.ExportedProgram, segments: _Segments) -> None:
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
        graph = segments.graph(kind, layer)
        lowered = LoweredBackendModule(stand_ins[key], "XnnpackBackend", graph.serialize(), [])
        name = f"lowered_module_{layer}_{kind}"
        module.add_module(name, lowered)
        with module.graph.inserting_before(node):
            attribute = module.graph.get_attr(name)
            call = module.graph.call_function(
                executorch_call_delegate, (attribute, *inputs), {}
            )
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


def _store_embedding_once(data: memoryview) -> Iterator[bytes | memoryview]:
    """The same program with the tied embedding's bytes in the file once.

    The lookup table lies among the program's constants, the output layer's filter in a segment of
    its own; where their bytes are equal, that segment is made to point at the constants.
    """
    header = pte._get_extended_header(bytes(data[:64]))
    assert header is not None
    program = pte._flatbuffer_to_program(bytes(data[: header.program_size]))
    base = header.segment_base_offset
    segments = [data[base + s.offset : base + s.offset + s.size] for s in program.segments]
    constants = segments[program.constant_segment.segment_index]
    names = {named.key: named.segment_index for named in program.named_data or []}
    shared = names.get(EMBEDDING)
    inside = None
    if shared is not None:
        size = len(segments[shared])
        inside = next(
            (at for at in program.constant_segment.offsets
             if constants[at : at + size] == segments[shared]),
            None,
        )
    kept = [i for i in range(len(segments)) if i != shared or inside is None]
    place, offset = dict[int, int](), 0
    for index in kept:
        place[index] = offset
        offset = _aligned(offset + len(segments[index]))
    if shared is not None and inside is not None:
        place[shared] = place[program.constant_segment.segment_index] + inside
    program.segments = [
        DataSegment(offset=place[i], size=len(segment)) for i, segment in enumerate(segments)
    ]
    flatbuffer = pte._program_to_flatbuffer(program, constant_tensor_alignment=16)
    header_size = pte.aligned_size(pte._ExtendedHeader.EXPECTED_LENGTH, flatbuffer.max_alignment)
    program_size = header_size + len(flatbuffer.data)
    end = place[kept[-1]] + len(segments[kept[-1]])
    new_header = pte._ExtendedHeader(
        program_size=program_size,
        segment_base_offset=_aligned(program_size),
        segment_data_size=end,
    )
    head = pte._insert_flatbuffer_header(
        flatbuffer_data=flatbuffer.data,
        magic_regex=r"ET[0-9a-zA-Z][0-9a-zA-Z]",
        header_data=pte.pad_to(new_header.to_bytes(), header_size),
    )
    yield head + b"\0" * (_aligned(len(head)) - len(head))
    for index in kept:
        yield segments[index]
        if index != kept[-1]:
            yield b"\0" * (_aligned(len(segments[index])) - len(segments[index]))


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


def weights(artifact: Artifact, waist: QuantizedCheckpoint) -> Iterator[
    tuple[str, str, QuantizedTensor | Tensor]
]:
    """Every weight decoded out of the .pte: name, place in the file, codes and scales.

    The tied embedding is in the program twice, as table and as filter, and is given twice.
    """
    path = artifact.path / FILE_NAME
    data = memoryview(path.read_bytes())
    header = pte._get_extended_header(bytes(data[:64]))
    if header is None:
        raise InputError(path, "is not an ExecuTorch program with segments")
    program = pte._flatbuffer_to_program(bytes(data[: header.program_size]))
    base = header.segment_base_offset

    def segment(index: int) -> memoryview:
        place = program.segments[index]
        return data[base + place.offset : base + place.offset + place.size]

    named = {entry.key: entry.segment_index for entry in program.named_data or []}
    shapes = waist.config.parameter_shapes()
    for name, shape in shapes.items():
        untied_embedding = name == EMBEDDING and not waist.config.tie_word_embeddings
        if untied_embedding:
            continue
        if name not in named:
            raise InputError(f"{path}: {name}", "is not in the program")
        like = waist.read(name)
        content = bytes(segment(named[name]))
        if not isinstance(like, QuantizedTensor):
            yield name, "constant", torch.frombuffer(bytearray(content), dtype=torch.float32).view(
                shape
            )
            continue
        scales = bytes(segment(named[f"{name}.scales"]))
        found = decode_filter(content, scales, (shape[0], shape[1]), like)
        if name == EMBEDDING and like.scheme.bits == 4:
            found = QuantizedTensor(_exchange_columns(found.codes), found.scales, found.scheme)
        yield name, "filter", found
    table = _embedding_table(program, segment, waist)
    yield EMBEDDING, "table", table


def _embedding_table(
    program: Any, segment: Any, waist: QuantizedCheckpoint
) -> QuantizedTensor | Tensor:
    """The lookup table, found through the program's own embedding instruction."""
    plan = next(plan for plan in program.execution_plan if plan.name == "forward")
    constants = segment(program.constant_segment.segment_index)
    offsets = program.constant_segment.offsets

    def constant(argument: int, size: int) -> bytes:
        start = offsets[plan.values[argument].val.data_buffer_idx]
        return bytes(constants[start : start + size])

    like, rows = waist.read(EMBEDDING), waist.config.vocab_size
    columns = waist.config.hidden_size
    for instruction in plan.chains[0].instructions:
        call = instruction.instr_args
        op_index = getattr(call, "op_index", None)
        if op_index is None or "embedding" not in plan.operators[op_index].name:
            continue
        if not isinstance(like, QuantizedTensor):
            raw = bytearray(constant(call.args[0], rows * columns * 4))
            return torch.frombuffer(raw, dtype=torch.float32).view(rows, columns)
        assert like.scheme.bits is not None
        codes = torch.frombuffer(
            bytearray(constant(call.args[0], rows * columns * like.scheme.bits // 8)),
            dtype=torch.uint8,
        )
        scales = torch.frombuffer(
            bytearray(constant(call.args[1], like.scales.numel() * 4)), dtype=torch.float32
        )
        if like.scheme.bits == 4:
            codes = torch.stack((codes >> 4, codes & 0x0F), -1).flatten().to(torch.int8) - 8
        else:
            codes = codes.view(torch.int8)
        return QuantizedTensor(codes.view(rows, columns), scales.view_as(like.scales), like.scheme)
    raise InputError("forward", "has no embedding instruction")


class ExecuTorchRunner:
    """The artifact in ExecuTorch's own runtime on this machine."""

    def __init__(self, path: Path) -> None:
        with _quietly():
            self._module = portable_lib._load_for_executorch(str(path))
            self._context = int(self._module.run_method("get_max_context_len", ())[0])
        self._position = 0

    @property
    def context(self) -> int:
        return self._context

    def prefill(self, tokens: list[int]) -> Tensor:
        self._position = 0
        return self._step(tokens)

    def decode(self, token: int) -> Tensor:
        return self._step([token])

    def _step(self, tokens: list[int]) -> Tensor:
        inputs = torch.tensor([tokens]), torch.tensor([self._position])
        with _quietly():
            logits = self._module.run_method("forward", inputs)[0]
        self._position += len(tokens)
        return logits[0].clone()


def load(artifact: Artifact) -> ExecuTorchRunner:
    """The artifact ready to run. The whole file is read, so that a short one is refused."""
    return ExecuTorchRunner(artifact.path / FILE_NAME)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep what the toolkit prints (warnings, its C++ log on file descriptor 2) off the screen."""
    if logging.getLogger("exporter").isEnabledFor(logging.DEBUG):
        yield
        return
    saved = os.dup(2)
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(sink)
