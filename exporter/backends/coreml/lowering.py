"""Write the package of a Core ML artifact, read its weights back, and run it."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version as metadata_version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from exporter.backends import Artifact
from exporter.backends.coreml import FILE_NAME, FILES, MODEL, WEIGHTS, Target
from exporter.backends.coreml import interpreted as interpreted_here
from exporter.backends.coreml.constants import mil_name
from exporter.backends.coreml.graph import LOGITS
from exporter.backends.coreml.interpreter import Interpreter, State, readers_of
from exporter.backends.coreml.package import (
    Package,
    Value,
    open_package,
    weights_warning,
    write_manifest,
)
from exporter.backends.coreml.palette import read_palettes
from exporter.backends.coreml.program import DECODE, PREFILL, build_program
from exporter.backends.coreml.schemes import CODE_KINDS
from exporter.backends.coreml.toolkit import Program, coremltools
from exporter.backends.coreml.toolkit import load as to_specification
from exporter.errors import InputError
from exporter.files import replacing_folder, sha256
from exporter.quantization.quantized_checkpoint import MANIFEST as QUANTIZED_MANIFEST
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint
from exporter.quantization.schemes import QuantizedTensor, Scheme

#: The processors that may run a package. The Neural Engine computes int4 in blocks wrongly
#: (apple/coreai-models 279), so only a package in its own form may run there.
_COMPUTE_UNITS = {
    "cpu_and_gpu": coremltools.ComputeUnit.CPU_AND_GPU,
    "neural_engine": coremltools.ComputeUnit.CPU_AND_NE,
}
_IOS_18 = 9  # the specification version of iOS 18 and macOS 15


def lower(quantized: QuantizedCheckpoint, target: Target, out: Path) -> Artifact:
    """Write `out`/model.mlpackage."""
    program = build_program(quantized, target)
    with replacing_folder(out / FILE_NAME) as folder:
        write_package(program, quantized, target, folder)
    return Artifact(out, target, FILES)


def write_package(
    program: Program, quantized: QuantizedCheckpoint, target: Target, folder: Path
) -> Any:
    """Write the files of a package into the empty `folder`. Returns its protobuf."""
    weights_folder = (folder / WEIGHTS).parent
    weights_folder.mkdir(parents=True)
    specification = to_specification(program, str(weights_folder), specification_version=_IOS_18)
    _describe(specification.description.metadata, quantized, target)
    (folder / MODEL).write_bytes(specification.SerializeToString(deterministic=True))
    write_manifest(folder)
    if warning := weights_warning(folder):
        logging.getLogger(__name__).warning(warning)
    return specification


def _describe(metadata: Any, quantized: QuantizedCheckpoint, target: Target) -> None:
    """Set the metadata that Xcode shows, and the metadata that an app reads."""
    config, tokenizer = quantized.config, quantized.path / "tokenizer.json"
    facts = {
        "max_context": str(target.max_context),
        "prefill": str(target.prefill),
        "output": target.output,
        "compute": target.compute,
        "tested": "in a reference interpreter, not run on hardware",
        "vocab_size": str(config.vocab_size),
        "bos_token_id": json.dumps(quantized.bos_token_id),
        "eos_token_ids": json.dumps(list(quantized.eos_token_ids)),
        "quantized_sha256": sha256(quantized.path / QUANTIZED_MANIFEST),
    }
    if tokenizer.is_file():
        facts["tokenizer_sha256"] = sha256(tokenizer)
    metadata.shortDescription = (
        f"{config.model_type} decoder, {config.num_hidden_layers} layers of {config.hidden_size}, "
        f"with a cache of {target.max_context} tokens"
    )
    metadata.versionString = metadata_version("mobilellm-exporter")
    metadata.author, metadata.license = target.author, target.license
    metadata.userDefined.update(facts)


def weights(
    artifact: Artifact, quantized: QuantizedCheckpoint
) -> Iterator[tuple[str, str, QuantizedTensor | Tensor]]:
    """Every weight decoded from the package (see `package_weights`)."""
    return package_weights(open_package(artifact.path / FILE_NAME), quantized)


def package_weights(
    package: Package, quantized: QuantizedCheckpoint
) -> Iterator[tuple[str, str, QuantizedTensor | Tensor]]:
    """Every weight of every function: name, place, codes and scales or floats.

    The place is the function and the operators that read the weight. Raises InputError for a weight
    that a function lacks or does not use.
    """
    for function in package.functions:
        operations = package.block(function).operations
        readers = readers_of(operations)
        missing = {mil_name(name): name for name in quantized.schemes}
        for operation in operations:
            made = operation.outputs[0].name if operation.outputs else ""
            if made not in missing:
                continue
            name = missing.pop(made)
            if made not in readers:
                raise InputError(f"{name} ({function})", "is read by no operator")
            place = f"{function}: {', '.join(readers[made])}"
            yield name, place, _stored(package, operation, name, quantized.schemes[name])
        for name in missing.values():
            raise InputError(f"{name} ({function})", "is not in the program")


#: The operations that make a weight, and the constants that each has.
_PARTS = {
    "constexpr_blockwise_shift_scale": {"data", "scale"},
    "constexpr_lut_to_dense": {"indices", "lut"},
}


def _stored(
    package: Package, operation: Any, name: str, scheme: Scheme
) -> QuantizedTensor | Tensor:
    """The codes and scales, or floats, from which an operation makes a weight."""
    if operation.type == "const":
        value: Tensor = package.value(operation.attributes["val"]).data
        return value
    parts = _PARTS.get(operation.type)
    if parts is None:
        raise InputError(name, f"is made by {operation.type}, not by codes and scales")
    given = {part: binding.arguments[0].value for part, binding in operation.inputs.items()}
    if given.keys() != parts:
        found, wanted = (" and ".join(sorted(one)) for one in (given, parts))
        raise InputError(name, f"is made of {found}, not of {wanted}")
    if operation.type == "constexpr_lut_to_dense":
        indices, palettes = package.value(given["indices"]), package.value(given["lut"])
        if indices.kind != "uint4" or scheme != Scheme(4):
            raise InputError(name, f"has {indices.kind} indices of palettes, not {scheme}")
        return read_palettes(indices.data, palettes.data, scheme, name)
    codes, scales = package.value(given["data"]), package.value(given["scale"])
    if codes.kind != CODE_KINDS[scheme.code_bits]:
        raise InputError(name, f"has {codes.kind} codes, not {scheme}")
    return QuantizedTensor(codes.data, scales.data, scheme)


def check_room(tokens: int, context: int) -> None:
    """Raise InputError if the cache cannot hold so many tokens."""
    if not 0 < tokens <= context:
        raise InputError(
            "context",
            f"{tokens} tokens are not between 1 and {context}",
            "Lower the model with a larger max_context",
        )


#: Run a function on int32 inputs and update the state. Returns logits, float32 [1, 1, vocab_size].
Execute = Callable[[str, Mapping[str, Tensor], Any], Tensor]


class CoreMLRunner:
    """A `Runner` of a package: both functions over one cache."""

    def __init__(self, execute: Execute, new_state: Callable[[], Any], artifact: Artifact) -> None:
        self._execute, self._new_state = execute, new_state
        assert isinstance(artifact.target, Target)
        self.context, self._steps = artifact.target.max_context, artifact.target.prefill
        self._state, self._position = new_state(), 0
        described = open_package(artifact.path / FILE_NAME).spec.description.metadata
        self.vocab_size = int(described.userDefined["vocab_size"])

    def prefill(self, tokens: list[int]) -> Tensor:
        """Read the tokens in chunks.

        A chunk that would end beyond the cache begins earlier. It reads some tokens again and
        writes the same keys and values for them.
        """
        check_room(len(tokens), self.context)
        self._state, self._position = self._new_state(), 0
        steps = self._steps
        while self._position < len(tokens):
            start = min(self._position, self.context - steps)
            chunk = tokens[start : start + steps]
            padded = chunk + [0] * (steps - len(chunk))
            logits = self._run(PREFILL, input_ids=[padded], position=[start], length=[len(chunk)])
            self._position = start + len(chunk)
        return logits

    def decode(self, token: int) -> Tensor:
        check_room(self._position + 1, self.context)
        logits = self._run(DECODE, input_ids=[[token]], position=[self._position])
        self._position += 1
        return logits

    def _run(self, function: str, **inputs: Any) -> Tensor:
        tensors = {name: torch.tensor(value, dtype=torch.int32) for name, value in inputs.items()}
        return self._execute(function, tensors, self._state)[0, -1]


#: The ways to run a package in the reference interpreter: as it is, and with every float32 value
#: rounded to float16.
AS_IT_IS, WITHOUT_FLOAT32 = "interpreter", "float32_casts_ignored"


def load(artifact: Artifact, variant: str = "") -> CoreMLRunner:
    """The artifact in Core ML on a Mac, and in the reference interpreter elsewhere or as `variant`.

    With `output: token` it runs in the interpreter everywhere, since Core ML gives no logits then.
    """
    if _runs_here(artifact) and not variant:
        return _on_mac(artifact)
    return interpreted(artifact, half=variant == WITHOUT_FLOAT32)


def cross_checks(artifact: Artifact) -> tuple[str, ...]:
    """The reference interpreter, if `load` runs Core ML itself; and, if activations are float16
    but something else is float32, the interpreter without float32."""
    assert isinstance(artifact.target, Target)
    interpreter = (AS_IT_IS,) if _runs_here(artifact) else ()
    return interpreter + without_float32(artifact.target, open_package(artifact.path / FILE_NAME))


def without_float32(target: Target, package: Package) -> tuple[str, ...]:
    """The run without float32, for a package that has any but whose activations are float16."""
    float16 = target.activations == "float16"
    return (WITHOUT_FLOAT32,) if float16 and package.has_float32 else ()


def _runs_here(artifact: Artifact) -> bool:
    """Whether `load` runs Core ML itself."""
    assert isinstance(artifact.target, Target)
    return not interpreted_here(artifact.target)


def interpreted(artifact: Artifact, half: bool = False) -> CoreMLRunner:
    """The artifact in the reference interpreter, on any machine; `half` as in `Interpreter`."""
    package = open_package(artifact.path / FILE_NAME)
    # Where nothing is float32, this run is the one without float32, which finds overflows.
    interpreter = Interpreter(package, half or not package.has_float32)

    def execute(function: str, inputs: Mapping[str, Tensor], state: State) -> Tensor:
        values = {name: Value(tensor, "int32") for name, tensor in inputs.items()}
        return interpreter.run(function, values, state, also=[LOGITS])[LOGITS].data

    return CoreMLRunner(execute, interpreter.new_state, artifact)


def _on_mac(artifact: Artifact) -> CoreMLRunner:
    """The artifact in Core ML itself. Untested: no Mac was available."""
    assert isinstance(artifact.target, Target)
    path = str(artifact.path / FILE_NAME)
    units = _COMPUTE_UNITS[artifact.target.compute]
    functions = {
        name: coremltools.models.MLModel(path, compute_units=units, function_name=name)
        for name in (PREFILL, DECODE)
    }

    def execute(function: str, inputs: Mapping[str, Tensor], state: Any) -> Tensor:
        arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
        logits = functions[function].predict(arrays, state=state)[LOGITS]
        return torch.from_numpy(np.asarray(logits, np.float32))

    return CoreMLRunner(execute, functions[DECODE].make_state, artifact)
