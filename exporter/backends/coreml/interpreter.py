"""A reference interpreter of Core ML's ML Programs, for machines without Core ML.

It computes each operator in float32 and rounds the result to its declared type. Results can differ
from those of a GPU or a Neural Engine in the last bits, since these sum in other orders and types.
It is strict: an unsupported operator is an error, and so is a value whose type or shape is not the
declared one.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from exporter.backends.coreml.operators import OPERATORS, Operator, overwrite
from exporter.backends.coreml.package import TYPES, Package, Value, open_shape_of, place_of
from exporter.errors import InputError

#: The operators that read or write a state. All others are in `OPERATORS`.
STATEFUL = frozenset({"read_state", "write_state"})
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

    Raises InputError for an unsupported operator before anything runs.
    """

    def __init__(self, package: Package) -> None:
        self._package = package
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
        """The outputs of a function and the values named in `also`. Updates `state` in place."""
        function = self._functions[name]
        self._check_inputs(name, inputs)
        values: dict[str, Any] = {**function.constants, **inputs}
        wanted = {*function.outputs, *also}
        for step in function.steps:
            for declared, value in zip(
                step.outputs, self._compute(step, function, values, state), strict=True
            ):
                what = f"{name}: {declared.name} ({step.operator})"
                values[declared.name] = declared.check(value, what)
            for spent in step.spent - wanted:
                del values[spent]
        return {output: values[output] for output in wanted}

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
            return self._package.value(value)
        if place not in self._stored:
            self._stored[place] = self._package.value(value)
        return self._stored[place]

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
            self._stored[key] = _apply(OPERATORS[operation.type], arguments, what)[0]
        return output.check(self._stored[key], what)


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
    return Declared(name, TYPES[tensor.dataType][0], tuple(open_shape_of(tensor)))


def _with_last_uses(steps: Sequence[_Step]) -> list[_Step]:
    """The steps with `spent`: the results of earlier steps that they are the last to read."""
    made = {output.name for step in steps for output in step.outputs}
    needed, result = set[str](), list[_Step]()
    for step in reversed(steps):
        read = {
            name
            for given in step.inputs.values()
            for name in ([given] if isinstance(given, str) else given)
        }
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
