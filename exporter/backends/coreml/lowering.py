"""Write the package of a Core ML artifact, and read its weights back."""

import json
import logging
from collections.abc import Iterator
from importlib.metadata import version as metadata_version
from pathlib import Path
from typing import Any

from torch import Tensor

from exporter.backends import Artifact
from exporter.backends.coreml import FILE_NAME, MODEL, PACKAGE_FILES, TOKENIZER, WEIGHTS, Target
from exporter.backends.coreml.constants import mil_name
from exporter.backends.coreml.interpreter import readers_of
from exporter.backends.coreml.language_model import HUB_ID
from exporter.backends.coreml.package import (
    Package,
    open_package,
    weights_warning,
    write_manifest,
)
from exporter.backends.coreml.palette import read_palettes
from exporter.backends.coreml.program import build_program
from exporter.backends.coreml.schemes import CODE_KINDS
from exporter.backends.coreml.toolkit import Program
from exporter.backends.coreml.toolkit import load as to_specification
from exporter.errors import InputError
from exporter.files import replacing_folder, sha256, write_json
from exporter.quantization.quantized_checkpoint import MANIFEST as QUANTIZED_MANIFEST
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint
from exporter.quantization.schemes import QuantizedTensor, Scheme
from exporter.text.client_files import tokenizer_config

_IOS_18 = 9  # the specification version of iOS 18 and macOS 15


def lower(quantized: QuantizedCheckpoint, target: Target, out: Path) -> Artifact:
    """Write `out`/model.mlpackage, and the configuration of a tokenizer as swift-transformers reads
    it if the package is for that."""
    program = build_program(quantized, target)
    with replacing_folder(out / FILE_NAME) as folder:
        write_package(program, quantized, target, folder)
    written = PACKAGE_FILES
    if target.interface == "language_model":
        configuration = tokenizer_config(
            quantized.path, quantized.bos_token_id, quantized.eos_token_ids
        )
        if configuration is not None:
            write_json(out / TOKENIZER, configuration)
            written = (*written, TOKENIZER)
    return Artifact(out, target, written)


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
    if target.interface == "functions":
        facts = {"prefill": str(target.prefill)}
    else:
        facts = {"interface": target.interface}
        if target.hub_id:
            facts[HUB_ID] = target.hub_id
    facts |= {
        "max_context": str(target.max_context),
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
