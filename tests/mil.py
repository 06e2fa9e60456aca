"""Small ML Programs, written as packages: a protobuf and a weight file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import torch
from coremltools.converters.mil import Builder as mb  # noqa: N813  # its name everywhere
from coremltools.converters.mil.mil import Function, Program, types

from exporter.backends.coreml.package import (
    MODEL,
    WEIGHTS,
    Package,
    Value,
    open_package,
    rounded,
    write_manifest,
)
from exporter.backends.coreml.toolkit import load

Build = Callable[..., Any]
BUILT_IN = {"fp32": types.fp32, "fp16": types.fp16, "int32": types.int32}
iOS18 = ct.target.iOS18  # noqa: N816  # its name


def state_spec(*shape: int) -> Any:
    return mb.StateTensorSpec(shape, dtype=types.fp16)


def function(build: Build, **specs: Any) -> Any:
    """A function with these inputs: a spec, or a shape and a type. No output can be a bool."""
    inputs = {
        name: mb.TensorSpec(spec[0], dtype=BUILT_IN[spec[1]]) if isinstance(spec, tuple) else spec
        for name, spec in specs.items()
    }
    with Function(inputs, opset_version=iOS18) as made:
        outputs = build(**made.inputs)
        listed = outputs if isinstance(outputs, (list, tuple)) else [outputs]
        made.set_outputs(
            [mb.cast(x=one, dtype="int32") if one.dtype == types.bool else one for one in listed]
        )
    return made


def write(folder: Path, **functions: Any) -> Package:
    """A package of these functions. Nothing is optimized: an operator stays what it is."""
    program = Program()
    for name, made in functions.items():
        program.add_function(name, made)
    program.default_function_name = next(iter(functions))
    program.export_as_multifunction = len(functions) > 1
    path = folder / "model.mlpackage"
    (path / WEIGHTS).parent.mkdir(parents=True)
    specification = load(program, str((path / WEIGHTS).parent), specification_version=9)
    (path / MODEL).write_bytes(specification.SerializeToString())
    write_manifest(path)
    return open_package(path)


def value(array: np.ndarray[Any, Any], kind: str) -> Value:
    return rounded(torch.from_numpy(np.ascontiguousarray(array)), kind)
