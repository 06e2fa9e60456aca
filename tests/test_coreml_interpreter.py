"""The reference interpreter: every operator against NumPy, states, flexible shapes, errors.

Programs are made with coremltools' own builder and written in the real format: a protobuf and a
weight file, which the interpreter reads back.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb  # noqa: N813  # its name everywhere
from coremltools.converters.mil import get_new_symbol
from coremltools.converters.mil.mil import types
from mil import Build, function, iOS18, state_spec, value, write

from exporter.backends.coreml.interpreter import STATEFUL, Interpreter, State
from exporter.backends.coreml.operators import OPERATORS
from exporter.backends.coreml.package import TYPES, Package, Value, open_package
from exporter.errors import InputError

Array = np.ndarray[Any, Any]
#: The types that only constants have.
INT4, UINT4 = types.np_int4_dtype, types.np_uint4_dtype


def run(package: Package, state: State | None = None, **inputs: Value) -> list[Value]:
    """The outputs of the package's first function, in order."""
    interpreter = Interpreter(package)
    found = interpreter.run("main", inputs, interpreter.new_state() if state is None else state)
    return [found[name] for name in package.block("main").outputs]


@dataclass(frozen=True)
class Case:
    """An operator on inputs of these shapes, and what NumPy says that it gives.

    Inputs are floats, tried as fp32 and as fp16, or integers.
    """

    build: Build
    expected: Callable[..., Array | Sequence[Array]]
    shapes: tuple[tuple[int, ...], ...] = ((2, 3, 4),)
    integers: bool = False
    positive: bool = False

    def inputs(self) -> list[Array]:
        generator = np.random.default_rng(0)
        if self.integers:
            return [generator.integers(1, 9, shape).astype(np.int32) for shape in self.shapes]
        arrays = [generator.standard_normal(shape) for shape in self.shapes]
        return [np.abs(array) + 0.1 if self.positive else array for array in arrays]


def softmax(x: Array, axis: int = -1) -> Array:
    powers = np.exp(x - x.max(axis, keepdims=True))
    quotient: Array = powers / powers.sum(axis, keepdims=True)
    return quotient


def attend(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    scores = q @ np.swapaxes(k, -1, -2) / math.sqrt(q.shape[-1])
    product: Array = softmax(scores if mask is None else scores + mask) @ v
    return product


def unary(operator: str, expected: Callable[[Array], Array], positive: bool = False) -> Case:
    return Case(lambda x: getattr(mb, operator)(x=x), expected, positive=positive)


def binary(operator: str, expected: Callable[[Array, Array], Array], **options: bool) -> Case:
    """Two operands, the second of which is broadcast."""
    build: Build = lambda x, y: getattr(mb, operator)(x=x, y=y)  # noqa: E731
    return Case(build, expected, ((2, 3, 4), (3, 1)), **options)


def logical(operator: str, expected: Callable[[Array, Array], Array]) -> Case:
    def build(x: Any, y: Any) -> Any:
        return getattr(mb, operator)(x=mb.greater(x=x, y=4), y=mb.greater(x=y, y=4))

    return Case(build, lambda x, y: expected(x > 4, y > 4), ((3, 5), (3, 5)), integers=True)


WEIGHT = np.random.default_rng(1).standard_normal((5, 4))
QKV = ((1, 2, 3, 8), (1, 2, 6, 8), (1, 2, 6, 8))
MASK = np.where(np.arange(6)[None] > np.arange(3)[:, None] + 2, -1e4, 0.0)


def like(x: Any, array: Array) -> Array:
    """A constant of the type that x has."""
    return array.astype(np.float16 if x.dtype == types.fp16 else np.float32)


CASES: dict[str, dict[str, Case]] = {
    "add": {"": binary("add", np.add), "integers": binary("add", np.add, integers=True)},
    "sub": {"": binary("sub", np.subtract), "integers": binary("sub", np.subtract, integers=True)},
    "mul": {"": binary("mul", np.multiply)},
    "real_div": {"": binary("real_div", np.divide, positive=True)},
    "floor_div": {
        "": binary("floor_div", np.floor_divide, positive=True),
        "negative integers": Case(
            lambda x: mb.floor_div(x=mb.sub(x=x, y=5), y=3), lambda x: (x - 5) // 3, integers=True
        ),
    },
    "mod": {
        "": Case(lambda x: mb.mod(x=mb.sub(x=x, y=5), y=3), lambda x: (x - 5) % 3, integers=True)
    },
    "maximum": {"": binary("maximum", np.maximum)},
    "minimum": {"": binary("minimum", np.minimum)},
    "pow": {"": binary("pow", np.power, positive=True)},
    "equal": {"": binary("equal", np.equal, integers=True)},
    "not_equal": {"": binary("not_equal", np.not_equal, integers=True)},
    "less": {"": binary("less", np.less), "integers": binary("less", np.less, integers=True)},
    "less_equal": {"": binary("less_equal", np.less_equal, integers=True)},
    "greater": {"": binary("greater", np.greater, integers=True)},
    "greater_equal": {"": binary("greater_equal", np.greater_equal, integers=True)},
    "logical_and": {"": logical("logical_and", np.logical_and)},
    "logical_or": {"": logical("logical_or", np.logical_or)},
    "abs": {"": unary("abs", np.abs)},
    "square": {"": unary("square", np.square)},
    "sqrt": {"": unary("sqrt", np.sqrt, positive=True)},
    "exp": {"": unary("exp", np.exp)},
    "cos": {"": unary("cos", np.cos)},
    "sin": {"": unary("sin", np.sin)},
    "tanh": {"": unary("tanh", np.tanh)},
    "sigmoid": {"": unary("sigmoid", lambda x: 1 / (1 + np.exp(-x)))},
    "silu": {"": unary("silu", lambda x: x / (1 + np.exp(-x)))},
    "relu": {"": unary("relu", lambda x: np.maximum(x, 0))},
    "rsqrt": {
        "": Case(
            lambda x: mb.rsqrt(x=x, epsilon=like(x, np.array(0.5))[()]),
            lambda x: 1 / np.sqrt(x + 0.5), positive=True,
        ),
    },
    "cast": {
        "to integers, towards zero": Case(
            lambda x: mb.cast(x=mb.mul(x=x, y=like(x, np.array(3.0))[()]), dtype="int32"),
            lambda x: np.trunc(3 * x),
        ),
        "from integers": Case(lambda x: mb.cast(x=x, dtype="fp16"), lambda x: x, integers=True),
        "of what is true": Case(
            lambda x: mb.cast(x=mb.greater(x=x, y=4), dtype="fp16"), lambda x: x > 4, integers=True
        ),
        "wraps": Case(
            lambda x: mb.cast(x=mb.cast(x=mb.sub(x=x, y=5), dtype="uint16"), dtype="int32"),
            lambda x: (x - 5) % 65536, integers=True,
        ),
    },
    "linear": {
        "": Case(
            lambda x: mb.linear(x=x, weight=like(x, WEIGHT), bias=like(x, WEIGHT[:, 0])),
            lambda x: x @ WEIGHT.T + WEIGHT[:, 0],
        ),
    },
    "matmul": {
        "": Case(
            lambda x, y: mb.matmul(x=x, y=y), lambda x, y: x @ y, ((2, 3, 4), (2, 4, 5)),
        ),
        "transposed": Case(
            lambda x, y: mb.matmul(x=x, y=y, transpose_x=True, transpose_y=True),
            lambda x, y: x.T @ y.T, ((4, 3), (5, 4)),
        ),
    },
    "scaled_dot_product_attention": {
        "": Case(
            lambda x, y, z: mb.scaled_dot_product_attention(query=x, key=y, value=z), attend, QKV
        ),
        "masked": Case(
            lambda x, y, z: mb.scaled_dot_product_attention(
                query=x, key=y, value=z, attn_mask=like(x, MASK)
            ),
            lambda x, y, z: attend(x, y, z, MASK), QKV,
        ),
        "masked by what is true": Case(
            lambda x, y, z: mb.scaled_dot_product_attention(
                query=x, key=y, value=z, attn_mask=MASK == 0
            ),
            lambda x, y, z: attend(x, y, z, MASK), QKV,
        ),
    },
    "softmax": {"": Case(lambda x: mb.softmax(x=x, axis=1), lambda x: softmax(x, 1))},
    "reduce_mean": {
        "": Case(
            lambda x: mb.reduce_mean(x=x, axes=[-1], keep_dims=True),
            lambda x: x.mean(-1, keepdims=True),
        ),
    },
    "reduce_sum": {
        "": Case(lambda x: mb.reduce_sum(x=x, axes=[0, 2]), lambda x: x.sum((0, 2))),
        "integers": Case(
            lambda x: mb.reduce_sum(x=x, axes=[0, 2]), lambda x: x.sum((0, 2)), integers=True
        ),
    },
    "reduce_max": {"": Case(lambda x: mb.reduce_max(x=x, axes=[1]), lambda x: x.max(1))},
    "reduce_argmax": {
        "": Case(lambda x: mb.reduce_argmax(x=x, axis=-1), lambda x: x.argmax(-1)),
        "kept": Case(
            lambda x: mb.reduce_argmax(x=x, axis=1, keep_dims=True),
            lambda x: x.argmax(1, keepdims=True),
        ),
    },
    "gather": {
        "rows": Case(
            lambda x: mb.gather(x=x, indices=np.int32([[1, 0], [1, 1]]), axis=0),
            lambda x: x[[[1, 0], [1, 1]]],
        ),
        "along the last": Case(
            lambda x: mb.gather(x=x, indices=np.int32([-1, 2]), axis=-1), lambda x: x[..., [-1, 2]]
        ),
    },
    "select": {
        "": Case(
            lambda x, y: mb.select(cond=mb.greater(x=x, y=y), a=x, b=y), np.maximum, ((4,), (4,))
        ),
        "of a stretched condition": Case(
            lambda x, y: mb.select(cond=np.array([[True], [False]]), a=x, b=y),
            lambda x, y: np.stack((x[0], y[1])), ((2, 5), (2, 5)),
        ),
    },
    "reshape": {
        "": Case(lambda x: mb.reshape(x=x, shape=[4, 6]), lambda x: x.reshape(4, 6)),
        "a size kept, counted from the end, and one inferred": Case(
            lambda x: mb.reshape(x=x, shape=[0, -1]), lambda x: x.reshape(3, 8)
        ),
        "a size that is not there": Case(
            lambda x: mb.reshape(x=mb.reshape(x=x, shape=[-1]), shape=[0, -1, 2]),
            lambda x: x.reshape(1, 12, 2),
        ),
    },
    "transpose": {
        "": Case(lambda x: mb.transpose(x=x, perm=[2, 0, 1]), lambda x: x.transpose(2, 0, 1))
    },
    "expand_dims": {
        "": Case(lambda x: mb.expand_dims(x=x, axes=[0, -1]), lambda x: x[None, ..., None])
    },
    "squeeze": {"": Case(lambda x: mb.squeeze(x=x, axes=[0, 2]), np.squeeze, ((1, 3, 1),))},
    "concat": {
        "": Case(
            lambda x, y: mb.concat(values=[x, y], axis=1),
            lambda x, y: np.concatenate((x, y), 1), ((2, 3), (2, 4)),
        ),
        "of constants too": Case(
            lambda x: mb.concat(values=[np.int32([7]), x, np.int32([8, 9])], axis=0),
            lambda x: np.concatenate(([7], x, [8, 9])), ((1,),), integers=True,
        ),
    },
    "split": {
        "": Case(lambda x: mb.split(x=x, num_splits=2, axis=-1), lambda x: np.split(x, 2, -1))
    },
    "shape": {"": Case(lambda x: mb.shape(x=x), lambda x: np.array(x.shape))},
    "range_1d": {
        "": Case(
            lambda x: mb.range_1d(start=mb.squeeze(x=x, axes=[0]), end=20, step=3),
            lambda x: np.arange(x[0], 20, 3), ((1,),), integers=True,
        ),
    },
    "slice_by_index": {
        "": Case(
            lambda x: mb.slice_by_index(x=x, begin=[0, 1, 0], end=[2, 3, 4], stride=[1, 1, 2]),
            lambda x: x[:, 1:3, ::2],
        ),
        "masks and a place from the end": Case(
            lambda x: mb.slice_by_index(
                x=x, begin=[1, 0, -3], end=[2, 0, -1], begin_mask=[False, True, False],
                end_mask=[False, True, False], squeeze_mask=[True, False, False],
            ),
            lambda x: x[1, :, -3:-1],
        ),
    },
    "slice_by_size": {
        "": Case(
            lambda x: mb.slice_by_size(x=x, begin=[0, 1, 2], size=[2, -1, 1]),
            lambda x: x[:, 1:, 2:3],
        ),
    },
    "slice_update": {
        "": Case(
            lambda x, y: mb.slice_update(x=x, update=y, begin=[0, 1, 0], end=[2, 2, 4]),
            lambda x, y: np.concatenate((x[:, :1], y, x[:, 2:]), 1), ((2, 3, 4), (2, 1, 4)),
        ),
    },
}  # fmt: skip
TRIED = [
    pytest.param(operator, case, kind, id=f"{operator} {name} {kind}".replace("  ", " "))
    for operator, cases in CASES.items()
    for name, case in cases.items()
    for kind in (["int32"] if case.integers else ["fp32", "fp16"])
]


@pytest.mark.parametrize(("operator", "case", "kind"), TRIED)
def test_an_operator_computes_what_numpy_does(
    operator: str, case: Case, kind: str, tmp_path: Path
) -> None:
    arrays = case.inputs()
    inputs = {
        name: value(array, kind) for name, array in zip("xyz"[: len(arrays)], arrays, strict=True)
    }
    specs = {name: (array.shape, kind) for name, array in zip(inputs, arrays, strict=True)}
    package = write(tmp_path, main=function(case.build, **specs))
    assert operator in {operation.type for operation in package.block("main").operations}
    wide = [one.data.numpy() if kind == "int32" else one.data.double().numpy()
            for one in inputs.values()]  # fmt: skip
    expected = case.expected(*wide)
    found = run(package, **inputs)
    if isinstance(expected, np.ndarray):
        expected = [expected]
    assert len(found) == len(expected)
    for one, wanted in zip(found, expected, strict=True):
        assert one.data.shape == wanted.shape
        if one.kind in ("fp32", "fp16"):
            tolerance = 1e-3 if kind == "fp16" or one.kind == "fp16" else 1e-5
            torch.testing.assert_close(
                one.data.double(), torch.from_numpy(wanted).double(), rtol=tolerance, atol=tolerance
            )
        else:
            assert (one.data.numpy() == wanted).all()


BLOCKWISE, PALETTES = "constexpr_blockwise_shift_scale", "constexpr_lut_to_dense"


def test_no_operator_is_known_that_is_not_tried() -> None:
    assert OPERATORS.keys() == CASES.keys() | {BLOCKWISE, PALETTES}
    assert {"read_state", "write_state"} == STATEFUL


@pytest.mark.parametrize("blocks", [(8, 1), (8, 4), (1, 1), (2, 16)])
@pytest.mark.parametrize("offset", [False, True], ids=["", "offset"])
@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [(INT4, -8, 8), (UINT4, 0, 16), (np.int8, -128, 128), (np.uint8, 0, 256)],
    ids=["int4", "uint4", "int8", "uint8"],
)
def test_blocks_of_codes_are_scaled_as_they_are_defined(
    dtype: Any, low: int, high: int, offset: bool, blocks: tuple[int, int], tmp_path: Path
) -> None:
    generator = np.random.default_rng(2)
    codes = generator.integers(low, high, (8, 64))
    scales = generator.uniform(0.5, 2, blocks).astype(np.float16)
    shifts = generator.integers(low, high, blocks)

    def build(x: Any) -> Any:
        given = {"data": codes.astype(dtype), "scale": scales}
        given |= {"offset": shifts.astype(dtype)} if offset else {}
        return mb.linear(x=x, weight=getattr(mb, BLOCKWISE)(**given))

    package = write(tmp_path, main=function(build, x=((64, 64), "fp16")))
    spread = np.ones((8 // blocks[0], 64 // blocks[1]))
    wide = codes - np.kron(shifts, spread) * offset
    (found,) = run(package, x=value(np.eye(64), "fp16"))
    assert np.array_equal(found.data.T, (wide * np.kron(scales, spread)).astype(np.float16))


@pytest.mark.parametrize("blocks", [(8, 1), (1, 4), (1, 1), (4, 2)])
def test_palettes_give_their_entries(blocks: tuple[int, int], tmp_path: Path) -> None:
    """A palette for each row, for columns, for all, and for blocks."""
    generator = np.random.default_rng(5)
    indices = generator.integers(0, 16, (8, 20))
    palettes = generator.standard_normal((*blocks, 16, 1)).astype(np.float16)

    def build(x: Any) -> Any:
        weight = mb.constexpr_lut_to_dense(indices=indices.astype(UINT4), lut=palettes)
        return mb.linear(x=x, weight=weight)

    package = write(tmp_path, main=function(build, x=((20, 20), "fp16")))
    (found,) = run(package, x=value(np.eye(20), "fp16"))
    rows, columns = np.indices((8, 20))
    wanted = palettes[rows * blocks[0] // 8, columns * blocks[1] // 20, indices, 0]
    assert np.array_equal(found.data.T, wanted)


@pytest.mark.parametrize(
    ("kind", "bits"),
    [(kind, bits) for kind, _, bits in TYPES.values() if kind.startswith("uint") and bits < 8],
)
def test_values_of_less_than_a_byte_are_read_as_coremltools_packs_them(
    kind: str, bits: int, tmp_path: Path
) -> None:
    """A palette is the one constant that takes every width; only its indices are read here."""
    indices = np.random.default_rng(3).integers(0, 2**bits, (8, 20))
    palette = np.arange(2**bits, dtype=np.float16).reshape(1, 1, -1, 1)
    builtin = types.type_mapping.string_to_builtin(kind)
    narrow = indices.astype(types.nptype_from_builtin(builtin))

    def build(x: Any) -> Any:
        weight = mb.constexpr_lut_to_dense(indices=narrow, lut=palette)
        return mb.linear(x=x, weight=weight)

    package = write(tmp_path, main=function(build, x=((1, 20), "fp16")))
    operations = package.block("main").operations
    (stored,) = (one for one in operations if one.type == "constexpr_lut_to_dense")
    found = package.value(stored.inputs["indices"].arguments[0].value)
    assert found.kind == kind
    assert np.array_equal(found.data, indices)


def counter(name: str, rows: int, steps: int) -> Any:
    """Writes x [steps, 4] at `position` into a state [rows, 4] and gives all of the state."""

    def build(x: Any, position: Any, **states: Any) -> Any:
        state = states[name]
        zero = np.int32([0])
        end = mb.concat(values=[mb.add(x=position, y=np.int32([steps])), np.int32([4])], axis=0)
        after = mb.slice_update(
            x=mb.read_state(input=state),
            update=x,
            begin=mb.concat(values=[position, zero], axis=0),
            end=end,
        )
        return mb.mul(x=mb.coreml_update_state(state=state, value=after), y=np.float16(1))

    specs = {"x": ((steps, 4), "fp16"), "position": ((1,), "int32"), name: state_spec(rows, 4)}
    return function(build, **specs)


def numbers(steps: int, start: int) -> Value:
    return value(np.arange(start, start + 4 * steps, dtype=np.float32).reshape(steps, 4), "fp16")


def at(position: int) -> Value:
    return value(np.array([position]), "int32")


def test_a_state_is_kept_from_call_to_call_and_from_function_to_function(tmp_path: Path) -> None:
    package = write(tmp_path, three=counter("kept", 5, 3), one=counter("kept", 5, 1))
    interpreter = Interpreter(package)
    state = interpreter.new_state()
    interpreter.run("three", {"x": numbers(3, 10), "position": at(0)}, state)
    interpreter.run("one", {"x": numbers(1, 30), "position": at(3)}, state)
    (found,) = interpreter.run("one", {"x": numbers(1, 50), "position": at(1)}, state).values()
    wanted = torch.zeros(5, 4)
    wanted[:3], wanted[3], wanted[1] = numbers(3, 10).data, numbers(1, 30).data, numbers(1, 50).data
    assert torch.equal(found.data, wanted)
    assert torch.equal(state["kept"].data, wanted)
    assert not interpreter.new_state()["kept"].data.any()


def test_a_state_of_another_shape_cannot_take_its_place(tmp_path: Path) -> None:
    """Two functions may give one name to states that differ."""
    package = write(tmp_path, three=counter("kept", 5, 3), one=counter("kept", 6, 1))
    interpreter = Interpreter(package)
    state = interpreter.new_state()
    with pytest.raises(InputError, match="declared fp16"):
        for name, steps in (("three", 3), ("one", 1)):
            interpreter.run(name, {"x": numbers(steps, 0), "position": at(0)}, state)


@pytest.mark.parametrize("through_a_view", [False, True], ids=["itself", "a view of it"])
def test_what_was_read_from_a_state_does_not_change_when_the_state_does(
    through_a_view: bool, tmp_path: Path
) -> None:
    """The interpreter updates a state in its own memory only where nothing else looks at it."""

    def build(kept: Any) -> Any:
        before = mb.read_state(input=kept)
        seen = mb.transpose(x=before, perm=[1, 0]) if through_a_view else before
        after = mb.slice_update(
            x=before, update=np.full((1, 4), 9, np.float16), begin=[0, 0], end=[1, 4]
        )
        updated = mb.coreml_update_state(state=kept, value=after)
        return mb.add(x=seen, y=np.float16(0)), mb.add(x=updated, y=np.float16(0))

    package = write(tmp_path, main=function(build, kept=state_spec(2, 4)))
    before, after = run(package)
    assert not before.data.any()
    assert after.data.tolist() == [[9.0] * 4, [0.0] * 4]


def flexible(folder: Path, length: Any) -> Package:
    """A state of 8 rows, of which a flexible number is written at once; through ct.convert."""
    steps = get_new_symbol()

    @mb.program(  # type: ignore[untyped-decorator]
        input_specs=[mb.TensorSpec((steps, 4), types.fp16), mb.StateTensorSpec((8, 4), types.fp16)],
        opset_version=iOS18,
    )
    def program(x: Any, kept: Any) -> Any:
        rows = mb.slice_by_size(x=mb.shape(x=x), begin=[0], size=[1])
        after = mb.slice_update(
            x=mb.read_state(input=kept),
            update=x,
            begin=[0, 0],
            end=mb.concat(values=[rows, np.int32([4])], axis=0),
        )
        whole = mb.coreml_update_state(state=kept, value=after)
        weight = np.random.default_rng(4).standard_normal((16, 4)).astype(np.float16)
        return mb.linear(x=mb.slice_by_size(x=whole, begin=[0, 0], size=[-1, 4]), weight=weight)

    model = ct.convert(
        program,
        inputs=[ct.TensorType("x", shape=length, dtype=np.float16)],
        outputs=[ct.TensorType(dtype=np.float16)],
        minimum_deployment_target=iOS18,
        skip_model_load=True,
    )
    path = folder / "flexible.mlpackage"
    model.save(str(path))
    return open_package(path)


@pytest.mark.parametrize(
    ("shape", "allowed", "refused"),
    [
        (ct.Shape((ct.RangeDim(2, 6, default=4), 4)), (2, 3, 6), (1, 7)),
        (ct.EnumeratedShapes([(2, 4), (5, 4)]), (2, 5), (3, 6)),
    ],
    ids=["RangeDim", "EnumeratedShapes"],
)
def test_flexible_shapes_are_followed_and_their_limits_kept(
    shape: Any, allowed: tuple[int, ...], refused: tuple[int, ...], tmp_path: Path
) -> None:
    package = flexible(tmp_path, shape)
    weight = np.random.default_rng(4).standard_normal((16, 4)).astype(np.float16)
    for steps in allowed:
        (found,) = run(package, x=numbers(steps, 1))
        kept = np.zeros((8, 4), np.float32)
        kept[:steps] = numbers(steps, 1).data
        np.testing.assert_allclose(found.data, kept @ weight.T.astype(np.float32), rtol=2e-3)
    for steps in refused:
        with pytest.raises(
            InputError, match=rf"main: input x: has (a size of {steps}|shape \[{steps}, 4\])"
        ):
            run(package, x=numbers(steps, 1))


def product(folder: Path) -> Package:
    build: Build = lambda x: mb.relu(x=mb.linear(x=x, weight=WEIGHT.astype(np.float16)), name="y")  # noqa: E731
    return write(folder, main=function(build, x=((2, 4), "fp16")))


X = Value(torch.ones(2, 4), "fp16")


def edited(package: Package, operator: str, edit: Callable[[Any], object]) -> Package:
    (operation,) = (one for one in package.block("main").operations if one.type == operator)
    edit(operation)
    return package


def declare_size(axis: int, size: int) -> Callable[[Any], object]:
    def edit(operation: Any) -> None:
        dimension = operation.outputs[0].type.tensorType.dimensions[axis]
        dimension.constant.size = size

    return edit


def declare_type(name: str) -> Callable[[Any], object]:
    number = next(number for number, (kind, _, _) in TYPES.items() if kind == name)

    def edit(operation: Any) -> None:
        operation.outputs[0].type.tensorType.dataType = number

    return edit


def rename(operator: str) -> Callable[[Any], object]:
    return lambda operation: setattr(operation, "type", operator)


def another_dimension(operation: Any) -> None:
    operation.outputs[0].type.tensorType.dimensions.add().constant.size = 1


def no_alpha(operation: Any) -> None:
    operation.inputs["alpha"].CopyFrom(operation.inputs["x"])


@pytest.mark.parametrize(
    ("operator", "edit", "said"),
    {
        "a size": (
            "relu", declare_size(1, 6),
            r"main: y \(relu\): is fp16 \[2, 5\], but declared fp16 \[2, 6\]",
        ),
        "a rank": ("linear", another_dimension, r"\(linear\): is fp16 \[2, 5\], but declared"),
        "a type": ("relu", declare_type("fp32"), "is fp16 .* but declared fp32"),
        "an operator": (
            "relu", rename("elu"),
            "main: elu: is an operator that the reference interpreter does not support",
        ),
        "a parameter": ("relu", no_alpha, r"y \(relu\): cannot be computed .*alpha"),
    }.values(),
    ids=["a size", "a rank", "a type", "an operator", "a parameter"],
)  # fmt: skip
def test_a_package_that_declares_what_is_not_so_is_rejected(
    operator: str, edit: Callable[[Any], object], said: str, tmp_path: Path
) -> None:
    package = product(tmp_path)
    assert run(package, x=X)[0].data.shape == (2, 5)
    with pytest.raises(InputError, match=said):
        run(edited(package, operator, edit), x=X)


@pytest.mark.parametrize(
    ("inputs", "said"),
    {
        "another name": ({"z": X}, r"inputs of main: are \['z'\], not \['x'\]"),
        "one too many": ({"x": X, "z": X}, r"are \['x', 'z'\]"),
        "another shape": ({"x": Value(torch.ones(3, 4), "fp16")}, r"input x: is fp16 \[3, 4\]"),
        "another type": ({"x": Value(torch.ones(2, 4), "fp32")}, "input x: is fp32"),
    }.values(),
    ids=["another name", "one too many", "another shape", "another type"],
)
def test_inputs_are_what_the_function_declares(
    inputs: Mapping[str, Value], said: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said):
        run(product(tmp_path), **inputs)


def test_an_input_that_the_description_leaves_out_is_named(tmp_path: Path) -> None:
    package = product(tmp_path)
    del package.spec.description.input[:]
    with pytest.raises(InputError, match="main: input x: is not in the model's description"):
        run(package, x=X)


@pytest.mark.parametrize(
    ("specs", "build", "given", "said"),
    {
        "an index beyond": (
            {"x": ((3, 2), "fp32"), "i": ((1,), "int32")},
            lambda x, i: mb.gather(x=x, indices=i, axis=0, validate_indices=False),
            {"x": value(np.ones((3, 2)), "fp32"), "i": at(3)},
            r"\(gather\): indices go beyond the 3 entries of axis 0",
        ),
        "a slice beyond": (
            {"x": ((3, 2), "fp32"), "i": ((2,), "int32")},
            lambda x, i: mb.slice_by_size(x=x, begin=i, size=[1, 1]),
            {"x": value(np.ones((3, 2)), "fp32"), "i": value(np.array([3, 0]), "int32")},
            r"\(slice_by_size\): begin 3 and size 1 go beyond 3",
        ),
        "an update beyond": (
            {"x": ((3, 2), "fp32"), "i": ((2,), "int32")},
            lambda x, i: mb.slice_update(
                x=x, update=np.ones((1, 2), np.float32), begin=i, end=[4, 2]
            ),
            {"x": value(np.ones((3, 2)), "fp32"), "i": value(np.array([3, 0]), "int32")},
            r"\(slice_update\): slice 3:4:1 of 3 values",
        ),
    }.values(),
    ids=["an index beyond", "a slice beyond", "an update beyond"],
)
def test_what_leaves_a_tensor_is_an_error(
    specs: Mapping[str, Any], build: Build, given: Mapping[str, Value], said: str, tmp_path: Path
) -> None:
    package = write(tmp_path, main=function(build, **specs))
    with pytest.raises(InputError, match=said):
        run(package, **given)


def test_operands_of_two_types_are_an_error(tmp_path: Path) -> None:
    """coremltools' builder would refuse them; a file can hold them all the same."""
    build: Build = lambda x, y: mb.add(x=x, y=y)  # noqa: E731
    package = write(tmp_path, main=function(build, x=((2,), "fp16"), y=((2,), "fp16")))
    function_of = package.spec.mlProgram.functions["main"]
    number = next(number for number, (kind, _, _) in TYPES.items() if kind == "fp32")
    function_of.inputs[1].type.tensorType.dataType = number
    ones = torch.ones(2)
    with pytest.raises(InputError, match="operands are of different types: fp16, fp32"):
        run(package, x=Value(ones, "fp16"), y=Value(ones, "fp32"))


def test_a_float16_square_overflows_and_a_float32_one_does_not(tmp_path: Path) -> None:
    """Why a normalization squares in float32."""

    def build(x: Any) -> Any:
        return mb.square(x=x), mb.square(x=mb.cast(x=x, dtype="fp32"))

    package = write(tmp_path, main=function(build, x=((2,), "fp16")))
    half, single = run(package, x=value(np.array([255.0, 300.0]), "fp16"))
    assert half.data.tolist() == [65024.0, math.inf]
    assert single.data.tolist() == [65025.0, 90000.0]
