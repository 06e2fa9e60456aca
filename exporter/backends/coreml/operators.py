"""The operators of ML Programs, for the reference interpreter.

Each function has the name of its operator, and the operator's inputs as parameters (source: the
docstrings in coremltools' ``converters/mil/mil/ops/defs``). It computes in float32 and returns a
value of the type in the operator's definition. Functions raise InputError for operands of wrong
types and for options that are not supported.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from exporter.backends.coreml.package import FLOATS, Value, rounded
from exporter.errors import InputError

Operator = Callable[..., Value | tuple[Value, ...]]


def integers(value: Value) -> list[int]:
    """A vector such as axes or a shape, as Python integers."""
    return [int(number) for number in value.data.reshape(-1).tolist()]


def integer(value: Value) -> int:
    """A scalar as a Python integer."""
    return int(value.data.item())


def common_kind(*values: Value) -> str:
    """The type that all operands have. Raises InputError if they differ."""
    kinds = {value.kind for value in values}
    if len(kinds) > 1:
        raise InputError("operands", f"are of different types: {', '.join(sorted(kinds))}")
    return kinds.pop()


def float_kind(*values: Value) -> str:
    """The float type that all operands have. Raises InputError if there is none."""
    kind = common_kind(*values)
    if kind not in FLOATS:
        raise InputError("operand", f"is {kind}, not fp16 or fp32")
    return kind


def _unary(compute: Callable[[Tensor], Tensor]) -> Operator:
    return lambda x: rounded(compute(x.data), float_kind(x))


def _binary(compute: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    return lambda x, y: rounded(compute(x.data, y.data), common_kind(x, y))


def _comparison(compute: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    def compare(x: Value, y: Value) -> Value:
        common_kind(x, y)
        return Value(compute(x.data, y.data), "bool")

    return compare


def constexpr_blockwise_shift_scale(
    data: Value, scale: Value, offset: Value | None = None
) -> Value:
    """scale * (data - offset), with one scale and offset for each block of data."""
    codes = data.data.float()
    if offset is not None:
        codes = codes - _spread(offset.data.float(), codes.shape)
    return rounded(codes * _spread(scale.data, codes.shape), float_kind(scale))


def _spread(blocks: Tensor, shape: Sequence[int]) -> Tensor:
    """Repeat one number per block to one number per value of `shape`."""
    for axis, (count, size) in enumerate(zip(blocks.shape, shape, strict=True)):
        if size % count:
            raise InputError("scale", f"has {count} blocks along {size} values")
        if 1 < count < size:
            blocks = blocks.repeat_interleave(size // count, axis)
    return blocks


def constexpr_lut_to_dense(indices: Value, lut: Value, vector_axis: Value | None = None) -> Value:
    """The entries of palettes at indices. There is one palette for each block of indices."""
    *blocks, entries, width = lut.data.shape
    if width != 1 or vector_axis is not None:
        raise InputError("lut", "has entries of several values; only single ones are supported")
    shape, places = indices.data.shape, indices.data.long()
    if int(places.max()) >= entries:
        raise InputError("indices", f"go beyond the {entries} entries of a palette")
    palette = _spread(torch.arange(math.prod(blocks)).reshape(blocks), shape)
    entry = lut.data.reshape(-1)[palette.expand(shape) * entries + places]
    return rounded(entry, float_kind(lut))


def cast(x: Value, dtype: str) -> Value:
    return rounded(x.data, dtype)


def linear(x: Value, weight: Value, bias: Value | None = None) -> Value:
    operands = (x, weight) if bias is None else (x, weight, bias)
    product = F.linear(x.data, weight.data, None if bias is None else bias.data)
    return rounded(product, float_kind(*operands))


def matmul(
    x: Value, y: Value, transpose_x: Value | None = None, transpose_y: Value | None = None
) -> Value:
    left = x.data.mT if transpose_x is not None and integer(transpose_x) else x.data
    right = y.data.mT if transpose_y is not None and integer(transpose_y) else y.data
    return rounded(left @ right, float_kind(x, y))


def scaled_dot_product_attention(
    query: Value, key: Value, value: Value, attn_mask: Value | None = None
) -> Value:
    kind = float_kind(query, key, value)
    if attn_mask is not None and attn_mask.kind not in (kind, "bool"):
        raise InputError("attn_mask", f"is {attn_mask.kind}, the query is {kind}")
    scores = query.data @ key.data.mT / math.sqrt(query.data.shape[-1])
    if attn_mask is not None and attn_mask.kind == "bool":
        scores = scores.masked_fill(~attn_mask.data, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask.data
    return rounded(scores.softmax(-1) @ value.data, kind)


def softmax(x: Value, axis: Value) -> Value:
    return rounded(x.data.softmax(integer(axis)), float_kind(x))


def rsqrt(x: Value, epsilon: Value) -> Value:
    return rounded((x.data + epsilon.data).rsqrt(), float_kind(x, epsilon))


def reduce_mean(x: Value, axes: Value, keep_dims: Value) -> Value:
    return rounded(x.data.mean(integers(axes), bool(integer(keep_dims))), float_kind(x))


def reduce_sum(x: Value, axes: Value, keep_dims: Value) -> Value:
    return rounded(x.data.sum(integers(axes), bool(integer(keep_dims))), x.kind)


def reduce_max(x: Value, axes: Value, keep_dims: Value) -> Value:
    return rounded(x.data.amax(integers(axes), bool(integer(keep_dims))), x.kind)


def reduce_argmax(x: Value, axis: Value, keep_dims: Value, output_dtype: str = "int32") -> Value:
    return rounded(x.data.argmax(integer(axis), bool(integer(keep_dims))), output_dtype)


def gather(
    x: Value,
    indices: Value,
    axis: Value,
    batch_dims: Value | None = None,
    validate_indices: Value | None = None,
) -> Value:
    """Entries of x along an axis. An index out of range is an error, even without validation."""
    if batch_dims is not None and integer(batch_dims):
        raise InputError("batch_dims", f"is {integer(batch_dims)}; only 0 is supported")
    along, size = integer(axis) % x.data.dim(), x.data.shape[integer(axis)]
    places = indices.data.long()
    if ((places < -size) | (places >= size)).any():
        raise InputError("indices", f"go beyond the {size} entries of axis {along}")
    entries = x.data.index_select(along, (places % size).reshape(-1))
    shape = (*x.data.shape[:along], *places.shape, *x.data.shape[along + 1 :])
    return Value(entries.reshape(shape), x.kind)


def select(cond: Value, a: Value, b: Value) -> Value:
    if cond.kind != "bool":
        raise InputError("cond", f"is {cond.kind}, not bool")
    return Value(torch.where(cond.data, a.data, b.data), common_kind(a, b))


def reshape(x: Value, shape: Value) -> Value:
    """A 0 in the shape means the size of x at the same place from the end, or 1 if x has none."""
    wanted = integers(shape)
    old_sizes = [1] * len(wanted) + list(x.data.shape)
    sizes = [size or old for size, old in zip(wanted, old_sizes[x.data.dim() :], strict=True)]
    return Value(x.data.reshape(sizes), x.kind)


def transpose(x: Value, perm: Value) -> Value:
    return Value(x.data.permute(integers(perm)), x.kind)


def expand_dims(x: Value, axes: Value) -> Value:
    data, rank = x.data, x.data.dim() + axes.data.numel()
    for axis in sorted(axis % rank for axis in integers(axes)):
        data = data.unsqueeze(axis)
    return Value(data, x.kind)


def squeeze(x: Value, axes: Value) -> Value:
    return Value(x.data.squeeze(integers(axes)), x.kind)


def concat(values: list[Value], axis: Value, interleave: Value | None = None) -> Value:
    if interleave is not None and integer(interleave):
        raise InputError("interleave", "is true; only false is supported")
    data = torch.cat([value.data for value in values], integer(axis))
    return Value(data, common_kind(*values))


def split(x: Value, num_splits: Value, axis: Value) -> tuple[Value, ...]:
    count, along = integer(num_splits), integer(axis)
    if x.data.shape[along] % count:
        raise InputError("num_splits", f"{count} does not divide {x.data.shape[along]}")
    return tuple(Value(part, x.kind) for part in x.data.chunk(count, along))


def shape(x: Value) -> Value:
    return Value(torch.tensor(x.data.shape, dtype=torch.int32), "int32")


def range_1d(start: Value, end: Value, step: Value) -> Value:
    first, last, by = (value.data.item() for value in (start, end, step))
    return rounded(torch.arange(first, last, by), common_kind(start, end, step))


def slice_by_index(x: Value, **bounds: Value) -> Value:
    """`bounds` are the parameters of `_window`."""
    return Value(x.data[_window(x.data, **bounds)], x.kind)


def slice_by_size(x: Value, begin: Value, size: Value) -> Value:
    """A size of -1 means up to the end of the axis."""
    data = x.data
    for axis, (first, count) in enumerate(zip(integers(begin), integers(size), strict=True)):
        length = data.shape[axis] - first if count == -1 else count
        if first < 0 or first + length > data.shape[axis]:
            raise InputError("begin", f"{first} and size {length} go beyond {data.shape[axis]}")
        data = data.narrow(axis, first, length)
    return Value(data, x.kind)


def slice_update(x: Value, update: Value, **bounds: Value) -> Value:
    """`bounds` are the parameters of `_window`."""
    return overwrite(Value(x.data.clone(), x.kind), update, **bounds)


def overwrite(x: Value, update: Value, **bounds: Value) -> Value:
    """slice_update in the memory of x, for an x that no other operation reads."""
    common_kind(x, update)
    window = _window(x.data, **bounds)
    if x.data[window].shape != update.data.shape:
        wanted, found = list(x.data[window].shape), list(update.data.shape)
        raise InputError("update", f"has shape {found}, the window {wanted}")
    x.data[window] = update.data
    return x


def _window(
    x: Tensor,
    begin: Value,
    end: Value,
    stride: Value | None = None,
    begin_mask: Value | None = None,
    end_mask: Value | None = None,
    squeeze_mask: Value | None = None,
) -> tuple[Any, ...]:
    """The index of a slice. A slice beyond x is an error, since runtimes treat it differently."""
    none = [0] * x.dim()
    steps = integers(stride) if stride is not None else [1] * x.dim()
    from_start, to_end, single = (
        integers(mask) if mask is not None else none
        for mask in (begin_mask, end_mask, squeeze_mask)
    )
    window: list[Any] = []
    for axis, (start, stop) in enumerate(zip(integers(begin), integers(end), strict=True)):
        size = x.shape[axis]
        first = 0 if from_start[axis] else start + size if start < 0 else start
        last = size if to_end[axis] else stop + size if stop < 0 else stop
        last = first + 1 if single[axis] else last
        if not 0 <= first < last <= size or steps[axis] < 1:
            raise InputError("slice", f"{first}:{last}:{steps[axis]} of {size} values")
        window.append(first if single[axis] else slice(first, last, steps[axis]))
    return tuple(window)


#: Every supported operator by name.
OPERATORS: dict[str, Operator] = {
    "add": _binary(torch.add),
    "sub": _binary(torch.sub),
    "mul": _binary(torch.mul),
    "real_div": lambda x, y: rounded(x.data / y.data, float_kind(x, y)),
    "floor_div": _binary(torch.floor_divide),
    "mod": _binary(torch.remainder),
    "maximum": _binary(torch.maximum),
    "minimum": _binary(torch.minimum),
    "pow": _binary(torch.pow),
    "equal": _comparison(torch.eq),
    "not_equal": _comparison(torch.ne),
    "less": _comparison(torch.lt),
    "less_equal": _comparison(torch.le),
    "greater": _comparison(torch.gt),
    "greater_equal": _comparison(torch.ge),
    "logical_and": _comparison(torch.logical_and),
    "logical_or": _comparison(torch.logical_or),
    "abs": _unary(torch.abs),
    "square": _unary(torch.square),
    "sqrt": _unary(torch.sqrt),
    "exp": _unary(torch.exp),
    "cos": _unary(torch.cos),
    "sin": _unary(torch.sin),
    "tanh": _unary(torch.tanh),
    "sigmoid": _unary(torch.sigmoid),
    "silu": _unary(F.silu),
    "relu": _unary(F.relu),
    **{
        operator.__name__: operator
        for operator in (
            cast, concat, constexpr_blockwise_shift_scale, constexpr_lut_to_dense, expand_dims,
            gather, linear, matmul, range_1d, reduce_argmax, reduce_max, reduce_mean, reduce_sum,
            reshape, rsqrt, scaled_dot_product_attention, select, shape, slice_by_index,
            slice_by_size, slice_update, softmax, split, squeeze, transpose,
        )
    },
}  # fmt: skip
