"""Inspect any Core ML package: functions, states, operators and weight formats.

mobilellm inspect build/nano/coreml/model.mlpackage
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from exporter import backends
from exporter.backends import InspectedTable
from exporter.backends.coreml.interpreter import STATEFUL
from exporter.backends.coreml.operators import OPERATORS
from exporter.backends.coreml.package import (
    Package,
    open_package,
    open_shape_of,
    place_of,
    shape_of,
    type_of,
    weights_warning,
)


@dataclass(frozen=True)
class Feature:
    """An input, a state or an output. A flexible dimension is a text: ``1..64`` or ``1|16|64``."""

    name: str
    type: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Function:
    """A function and its number of calls of each operator.

    The reference interpreter does not support the operators in `unknown`.
    """

    name: str
    inputs: tuple[Feature, ...]
    states: tuple[Feature, ...]
    outputs: tuple[Feature, ...]
    operators: Mapping[str, int]
    unknown: tuple[str, ...]


@dataclass(frozen=True)
class WeightFormat:
    """A storage format of weights: its number of tensors, and their bytes including scales.

    A tensor that several functions share counts once.
    """

    format: str
    tensors: int
    bytes: int


@dataclass(frozen=True)
class Inspection:
    """The content of a package."""

    path: str
    specification_version: int
    description: str
    metadata: Mapping[str, str]
    functions: tuple[Function, ...]
    weights: tuple[WeightFormat, ...]
    notes: tuple[str, ...]


def inspect_package(path: Path) -> Inspection:
    """Read a .mlpackage without running it. Raises InputError."""
    package = open_package(path)
    described = package.spec.description
    functions = tuple(_function(package, name) for name in package.functions)
    known = {
        "author": described.metadata.author,
        "license": described.metadata.license,
        "version": described.metadata.versionString,
    }
    return Inspection(
        path=str(path),
        specification_version=package.spec.specificationVersion,
        description=described.metadata.shortDescription,
        metadata={
            **{name: text for name, text in known.items() if text},
            **dict(sorted(described.metadata.userDefined.items())),
        },
        functions=functions,
        weights=tuple(_weights(package)),
        notes=tuple(_notes(path, functions)),
    )


def describe(package: Inspection) -> backends.Inspection:
    """The tables that `mobilellm inspect` shows."""
    facts = {"description": package.description} if package.description else {}
    facts["specification"] = f"version {package.specification_version}"
    features = [
        (
            function.name,
            role.removesuffix("s"),
            part.name,
            part.type,
            " × ".join(map(str, part.shape)),
        )
        for function in package.functions
        for role in ("inputs", "states", "outputs")
        for part in getattr(function, role)
    ]
    counts = [function.operators for function in package.functions]
    operators = [
        (name, *(str(count.get(name, "–")) for count in counts))
        for name in dict.fromkeys(name for count in counts for name in count)
    ]
    weights = [
        (weight.format, str(weight.tensors), f"{weight.bytes / 1e6:,.1f} MB")
        for weight in package.weights
    ]
    functions = tuple(function.name for function in package.functions)
    return backends.Inspection(
        content=asdict(package),
        title=package.path,
        facts=facts | dict(package.metadata),
        tables=(
            InspectedTable(("function", "", "name", "type", "shape"), features, "Functions"),
            InspectedTable(("operator", *functions), operators, numbers=True),
            InspectedTable(("weights", "tensors", "size"), weights, numbers=True),
        ),
        notes=package.notes,
    )


def _notes(path: Path, functions: Sequence[Function]) -> Iterator[str]:
    """What a user should know of the package."""
    if warning := weights_warning(path):
        yield warning
    unknown = sorted({name for function in functions for name in function.unknown})
    if unknown:
        yield f"The reference interpreter does not support: {', '.join(unknown)}"


def _function(package: Package, name: str) -> Function:
    declared, block = package.spec.mlProgram.functions[name], package.block(name)
    description = package.spec.description
    described = {one.name: one for one in description.functions}.get(name, description)
    allowed = {feature.name: feature.type.multiArrayType for feature in described.input}
    inputs, states = list[Feature](), list[Feature]()
    for given in declared.inputs:
        kind = given.type.WhichOneof("type")
        if kind == "stateType":
            states.append(_feature(given.name, given.type.stateType.wrappedType))
        else:
            inputs.append(_feature(given.name, given.type, allowed.get(given.name)))
    made = {
        output.name: output.type for operation in _operations(block) for output in operation.outputs
    }
    operators = Counter(operation.type for operation in _operations(block))
    del operators["const"]
    return Function(
        name=name,
        inputs=tuple(inputs),
        states=tuple(states),
        outputs=tuple(_feature(name, made[name]) for name in block.outputs if name in made),
        operators=dict(operators.most_common()),
        unknown=tuple(sorted(set(operators) - OPERATORS.keys() - STATEFUL)),
    )


def _operations(block: Any) -> Iterator[Any]:
    """The operations of a block, and of the blocks nested in them (conditions and loops)."""
    for operation in block.operations:
        yield operation
        for inner in operation.blocks:
            yield from _operations(inner)


def _feature(name: str, declared: Any, allowed: Any = None) -> Feature:
    if declared.WhichOneof("type") != "tensorType":
        return Feature(name, declared.WhichOneof("type"), ())
    tensor = declared.tensorType
    shape = tuple("?" if size is None else size for size in open_shape_of(tensor))
    return Feature(name, type_of(tensor)[0], _flexible(allowed) or shape)


def _flexible(allowed: Any) -> tuple[int | str, ...]:
    """The flexible shape that a description allows; empty for a fixed shape."""
    kind = allowed.WhichOneof("ShapeFlexibility") if allowed is not None else None
    if kind == "shapeRange":
        spans = [(one.lowerBound, one.upperBound) for one in allowed.shapeRange.sizeRanges]
        return tuple(
            int(low) if low == high else f"{low}..{'' if high < 0 else high}" for low, high in spans
        )
    if kind == "enumeratedShapes":
        shapes = [tuple(one.shape) for one in allowed.enumeratedShapes.shapes]
        return tuple(
            "|".join(str(size) for size in sorted(set(sizes)))
            for sizes in zip(*shapes, strict=True)
        )
    return ()


def _weights(package: Package) -> Iterator[WeightFormat]:
    """The formats of all constants in the weight file, those with the most bytes first."""
    compressed, plain = dict[tuple[Any, ...], str](), dict[tuple[Any, ...], str]()
    sizes = dict[Any, int]()
    for function in package.functions:
        constants = dict[str, Any]()
        for operation in _operations(package.block(function)):
            given = _constants_of(operation, constants)
            if operation.type == "const":
                constants[operation.outputs[0].name] = given["val"]
            stored = {place_of(value): value for value in given.values() if place_of(value)}
            sizes |= {place: _stored_bytes(value) for place, value in stored.items()}
            if stored and operation.type.startswith("constexpr_"):
                compressed[tuple(stored)] = _format(operation.type, given)
            elif stored:
                plain[tuple(stored)] = _kind(given["val"])
    parts = {place for places in compressed for place in places}
    tensors, occupied = Counter[str](), Counter[str]()
    whole = {places: kind for places, kind in plain.items() if parts.isdisjoint(places)}
    for places, form in {**compressed, **whole}.items():
        tensors[form] += 1
        occupied[form] += sum(sizes[place] for place in places)
    for form, size in occupied.most_common():
        yield WeightFormat(form, tensors[form], size)


def _constants_of(operation: Any, constants: Mapping[str, Any]) -> dict[str, Any]:
    """The constants of an operation, stored in it or read by name: parameter → constant."""
    held = {name: operation.attributes[name] for name in operation.attributes if name != "name"}
    if not operation.type.startswith("constexpr_"):
        return held
    for parameter, given in operation.inputs.items():
        binding = given.arguments[0]
        held[parameter] = constants[binding.name] if binding.name else binding.value
    return held


def _stored_bytes(value: Any) -> int:
    declared = value.type.tensorType
    return -(-math.prod(shape_of(declared)) * type_of(declared)[2] // 8)


def _kind(value: Any) -> str:
    return type_of(value.type.tensorType)[0]


def _format(operator: str, given: Mapping[str, Any]) -> str:
    """How a compressed weight is stored: ``int4 in blocks of 1 × 32, fp16 scales``."""
    if operator == "constexpr_blockwise_shift_scale":
        data, scale = given["data"], given["scale"]
        sizes = (shape_of(value.type.tensorType) for value in (data, scale))
        blocks = [whole // max(scales, 1) for whole, scales in zip(*sizes, strict=True)]
        shape = " × ".join(map(str, blocks)) if len(set(blocks)) > 1 else str(blocks[0])
        offset = ", with offsets" if "offset" in given else ""
        return f"{_kind(data)} in blocks of {shape}, {_kind(scale)} scales{offset}"
    kinds = [_kind(value) for _, value in sorted(given.items()) if place_of(value)]
    return f"{operator} of {', '.join(kinds)}"
