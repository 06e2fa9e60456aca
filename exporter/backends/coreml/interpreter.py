"""A reference interpreter of Core ML's ML Programs, for machines without Core ML.

It computes each operator in float32 and rounds the result to its declared type. Results can differ
from those of a GPU or a Neural Engine in the last bits, since these sum in other orders and types.
It is strict: an unsupported operator is an error, and so is a value whose type or shape is not the
declared one.

It can also compute everything that a program declares as float32 in float16. Lowerings to the
Neural Engine are reported to do so: they drop casts to float32 (pytorch/executorch 19523).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from exporter.backends.coreml.operators import OPERATORS, Operator, overwrite
from exporter.backends.coreml.package import (
    FLOATS,
    Package,
    Value,
    open_shape_of,
    place_of,
    rounded,
    type_of,
)
from exporter.errors import InputError

#: The operators that read or write a state. All others are in `OPERATORS`.
STATEFUL = frozenset({"read_state", "write_state"})
#: The operators that move numbers and compute none. Whole states go through them.
_MOVES = frozenset(
    "concat expand_dims gather read_state reshape select slice_by_index slice_by_size slice_update "
    "split squeeze transpose".split()
)
#: States by name. A run replaces the states that it writes.
State = dict[str, Value]


@dataclass(frozen=True)
class Declared:
    """The name, type and shape that a program declares for a value. A size of None is flexible."""

    name: str
    kind: str
    shape: tuple[int | None, ...]

    def check(self, value: Value, what: str) -> Value:
        """Return `value`. Raises InputError if its type or shape is not the declared one."""
        shape = tuple(value.data.shape)
        fits = len(shape) == len(self.shape) and all(
            size in (None, actual) for size, actual in zip(self.shape, shape, strict=True)
        )
        if value.kind != self.kind or not fits:
            declared = f"{self.kind} {list(self.shape)}"
            raise InputError(what, f"is {value.kind} {list(shape)}, but declared {declared}")
        return value


@dataclass(frozen=True)
class _Step:
    """One operation. Inputs are names of values. No later step reads the values in `spent`."""

    operator: str
    inputs: Mapping[str, str | list[str]]
    outputs: tuple[Declared, ...]
    spent: frozenset[str] = frozenset()
    #: Whether it updates a value read from a state, and the result is written to that state next.
    of_state: bool = False


@dataclass(frozen=True)
class _Function:
    inputs: tuple[Declared, ...]
    states: Mapping[str, Declared]
    constants: Mapping[str, Any]
    steps: tuple[_Step, ...]
    outputs: tuple[str, ...]


class Interpreter:
    """Runs the functions of a package. Constants are decoded once for all functions.

    With `half`, every float32 value is rounded to float16, and an overflow that this hides is an
    error. Raises InputError for an unsupported operator before anything runs.
    """

    def __init__(self, package: Package, half: bool = False) -> None:
        self._package, self._half = package, half
        self._stored = dict[Any, Value]()
        self._functions = {name: self._prepare(name) for name in package.functions}

    def declared(self, function: str) -> tuple[Declared, ...]:
        """The inputs of a function without its states."""
        return self._functions[function].inputs

    def new_state(self) -> State:
        """The states of all functions, filled with zeros."""
        return {
            name: Value(torch.zeros([size or 0 for size in state.shape]), state.kind)
            for function in self._functions.values()
            for name, state in function.states.items()
        }

    @torch.inference_mode()
    def run(
        self, name: str, inputs: Mapping[str, Value], state: State, also: Sequence[str] = ()
    ) -> dict[str, Value]:
        """The outputs of a function and the values named in `also`. Updates `state` in place.

        With `half`, raises InputError for the first operation whose result is not finite although
        its inputs are. It does not if a run without `half` shows it too: if the result is float16
        by declaration, and the outputs are not finite.
        """
        function = self._functions[name]
        self._check_inputs(name, inputs)
        values: dict[str, Any] = {**function.constants, **inputs}
        wanted, overflow, hidden = {*function.outputs, *also}, "", False
        for step in function.steps:
            for declared, value in zip(
                step.outputs, self._compute(step, function, values, state), strict=True
            ):
                what = f"{name}: {declared.name} ({step.operator})"
                values[declared.name] = declared.check(value, what)
                if self._half:
                    values[declared.name] = _in_half(value)
                    if not overflow and _overflows(step, declared, values):
                        overflow, hidden = what, declared.kind == "fp32"
            for spent in step.spent - wanted:
                del values[spent]
        outputs = {output: values[output] for output in wanted}
        if overflow and (hidden or all(_finite(value) for value in outputs.values())):
            raise InputError(
                overflow,
                "is not finite in float16, though its inputs are",
                "Set the target's activations to float32",
            )
        return outputs

    def _compute(
        self, step: _Step, function: _Function, values: Mapping[str, Any], state: State
    ) -> tuple[Value, ...]:
        if step.operator == "read_state":
            return (state[str(step.inputs["input"])],)
        if step.operator == "write_state":
            kept, data = function.states[str(step.inputs["input"])], str(step.inputs["data"])
            state[kept.name] = kept.check(values[data], f"the value written to {kept.name}")
            return ()
        arguments = {
            parameter: values[name] if isinstance(name, str) else [values[n] for n in name]
            for parameter, name in step.inputs.items()
        }
        in_place = step.of_state and _is_alone(values, str(step.inputs["x"]))
        compute = overwrite if in_place else OPERATORS[step.operator]
        return _apply(compute, arguments, f"{step.outputs[0].name} ({step.operator})")

    def _check_inputs(self, name: str, inputs: Mapping[str, Value]) -> None:
        """Check names, types and shapes, also against the model's description."""
        expected = [declared.name for declared in self._functions[name].inputs]
        if sorted(expected) != sorted(inputs):
            raise InputError(f"inputs of {name}", f"are {sorted(inputs)}, not {sorted(expected)}")
        allowed = {feature.name: feature.type.multiArrayType for feature in self._described(name)}
        for declared in self._functions[name].inputs:
            subject, shape = f"{name}: input {declared.name}", inputs[declared.name].data.shape
            declared.check(inputs[declared.name], subject)
            if declared.name not in allowed:
                raise InputError(subject, "is not in the model's description")
            _check_flexible(allowed[declared.name], tuple(shape), subject)

    def _described(self, name: str) -> Iterable[Any]:
        """The input features of a function in the model's description."""
        description = self._package.spec.description
        functions = {function.name: function for function in description.functions}
        features: Iterable[Any] = functions.get(name, description).input
        return features

    def _prepare(self, name: str) -> _Function:
        """Read a function: decode constants, check operators, find the last use of each value."""
        function, block = self._package.spec.mlProgram.functions[name], self._package.block(name)
        inputs, states = list[Declared](), dict[str, Declared]()
        for given in function.inputs:
            if given.type.WhichOneof("type") == "stateType":
                states[given.name] = _declared(given.name, given.type.stateType.wrappedType)
            else:
                inputs.append(_declared(given.name, given.type))
        constants, steps = dict[str, Any](), list[_Step]()
        for operation in block.operations:
            kind = operation.type
            if kind == "const":
                value = self._constant(operation.attributes["val"])
                constants[operation.outputs[0].name] = value
            elif kind not in OPERATORS.keys() | STATEFUL:
                raise InputError(
                    f"{name}: {kind}",
                    "is an operator that the reference interpreter does not support",
                )
            elif kind.startswith("constexpr_"):
                output = _declared(operation.outputs[0].name, operation.outputs[0].type)
                value = self._constant_expression(operation, constants, output)
                constants[output.name] = value
            else:
                steps.append(_step(operation, constants, self._constant))
        return _Function(
            inputs=tuple(inputs),
            states=states,
            constants=constants,
            steps=tuple(_with_updates_of_states(_with_last_uses(steps))),
            outputs=tuple(block.outputs),
        )

    def _constant(self, value: Any) -> Any:
        """A constant, decoded once for each place in the weight file."""
        place = place_of(value)
        if place is None:
            return self._decoded(value)
        if place not in self._stored:
            self._stored[place] = self._decoded(value)
        return self._stored[place]

    def _decoded(self, value: Any) -> Any:
        decoded = self._package.value(value)
        return _in_half(decoded) if self._half and isinstance(decoded, Value) else decoded

    def _constant_expression(
        self, operation: Any, constants: Mapping[str, Any], output: Declared
    ) -> Value:
        """The result of a ``constexpr`` operation, computed once for the same stored constants."""
        bindings = {name: given.arguments[0] for name, given in operation.inputs.items()}
        places = tuple(place_of(binding.value) for binding in bindings.values())
        key, what = (operation.type, *bindings, *places), f"{output.name} ({operation.type})"
        if None in places or key not in self._stored:
            arguments = {
                name: constants[binding.name]
                if binding.name
                else self._package.value(binding.value)
                for name, binding in bindings.items()
            }
            computed = _apply(OPERATORS[operation.type], arguments, what)[0]
            self._stored[key] = _in_half(computed) if self._half else computed
        return output.check(self._stored[key], what)


def _in_half(value: Value) -> Value:
    """A float32 value rounded to float16; its type is still called fp32."""
    return Value(rounded(value.data, "fp16").data, "fp32") if value.kind == "fp32" else value


def _overflows(step: _Step, declared: Declared, values: Mapping[str, Any]) -> bool:
    """Whether a result is not finite although all inputs are."""
    if step.operator in _MOVES or _finite(values[declared.name]):
        return False
    return all(_finite(values[name]) for name in _read_by(step))


def _finite(value: Any) -> bool:
    """Whether a value has no infinity and no NaN. A text, such as a type, has none."""
    has_numbers = isinstance(value, Value) and value.kind in FLOATS
    return not has_numbers or bool(value.data.isfinite().all())


def _read_by(step: _Step) -> Iterator[str]:
    """The names of the values that a step reads. The name of a state is not one of them."""
    for given in step.inputs.values():
        yield from [given] if isinstance(given, str) else given


def _apply(compute: Operator, arguments: Mapping[str, Any], what: str) -> tuple[Value, ...]:
    """The results of an operator. Raises InputError with the name of the output."""
    try:
        results = compute(**arguments)
    except InputError as error:
        raise InputError(what, f"{error.subject} {error.problem}") from error
    except (
        TypeError,
        ValueError,
        RuntimeError,
        IndexError,
    ) as error:  # an unknown parameter, or from torch
        raise InputError(what, f"cannot be computed ({error})") from error
    return results if isinstance(results, tuple) else (results,)


def _step(operation: Any, constants: dict[str, Any], constant: Any) -> _Step:
    """An operation whose inputs are all names. Its inline constants get generated names."""
    inputs = dict[str, str | list[str]]()
    for parameter, given in operation.inputs.items():
        names = list[str]()
        for index, binding in enumerate(given.arguments):
            name = binding.name or f"{operation.outputs[0].name}.{parameter}.{index}"
            if not binding.name:
                constants[name] = constant(binding.value)
            names.append(name)
        inputs[parameter] = names if parameter == "values" else names[0]
    outputs = tuple(_declared(output.name, output.type) for output in operation.outputs)
    return _Step(operation.type, inputs, outputs)


def _declared(name: str, declared: Any) -> Declared:
    tensor = declared.tensorType
    return Declared(name, type_of(tensor)[0], tuple(open_shape_of(tensor)))


def _with_last_uses(steps: Sequence[_Step]) -> list[_Step]:
    """The steps with `spent`: the results of earlier steps that they are the last to read."""
    made = {output.name for step in steps for output in step.outputs}
    needed, result = set[str](), list[_Step]()
    for step in reversed(steps):
        read = set(_read_by(step))
        result.append(replace(step, spent=frozenset((read & made) - needed)))
        needed |= read
    return result[::-1]


def _with_updates_of_states(steps: Sequence[_Step]) -> Iterator[_Step]:
    """The steps with `of_state` set for updates of a state that are written back next."""
    origin = {
        step.outputs[0].name: step.inputs["input"]
        for step in steps
        if step.operator == "read_state"
    }
    for index, step in enumerate(steps):
        state = origin.get(str(step.inputs.get("x"))) if step.operator == "slice_update" else None
        touching = (later for later in steps[index + 1 :] if later.inputs.get("input") == state)
        following = next(touching, None) if state and step.inputs["x"] in step.spent else None
        written = following.inputs.get("data") if following else None
        yield replace(step, of_state=bool(written) and written == step.outputs[0].name)


def _is_alone(values: Mapping[str, Any], name: str) -> bool:
    """Whether no other value shares its memory."""
    memory = values[name].data.untyped_storage().data_ptr()
    return not any(
        other != name
        and isinstance(value, Value)
        and value.data.untyped_storage().data_ptr() == memory
        for other, value in values.items()
    )


def readers_of(operations: Sequence[Any]) -> dict[str, list[str]]:
    """The operators that read each value of a block: name of the value → types of the operators."""
    readers = dict[str, list[str]]()
    for operation in operations:
        for given in operation.inputs.values():
            for binding in given.arguments:
                if binding.name:
                    readers.setdefault(binding.name, []).append(operation.type)
    return readers


def _check_flexible(allowed: Any, shape: tuple[int, ...], subject: str) -> None:
    """Check a shape against the enumerated shapes or ranges of an input's description."""
    if allowed.WhichOneof("ShapeFlexibility") == "enumeratedShapes":
        shapes = [tuple(one.shape) for one in allowed.enumeratedShapes.shapes]
        if shape not in shapes:
            raise InputError(subject, f"has shape {list(shape)}, which is none of {shapes}")
    elif allowed.WhichOneof("ShapeFlexibility") == "shapeRange":
        for size, limits in zip(shape, allowed.shapeRange.sizeRanges, strict=True):
            if size < limits.lowerBound or (0 <= limits.upperBound < size):
                span = f"{limits.lowerBound} to {limits.upperBound}"
                raise InputError(subject, f"has a size of {size}, outside of {span}")
