"""Write the .pte of an ExecuTorch artifact, and read its weights back."""

import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for _name in ("torch", "torchao"):
        logging.getLogger(_name).setLevel(logging.ERROR)
    from executorch import exir
    from executorch.exir.passes import MemoryPlanningPass

    from exporter.backends.executorch import comparison
    from exporter.backends.executorch.contents import open_contents
    from exporter.backends.executorch.decoding import read_weights
    from exporter.backends.executorch.file import store_embedding_once
    from exporter.backends.executorch.program import Program, delegate, export_program
    from exporter.backends.executorch.segments import Segments

from exporter.backends import Artifact
from exporter.backends.executorch import FILE_NAME, FILES, Target, embedded, longest_call
from exporter.backends.executorch.runtime import coreml_delegate, options_of, quietly
from exporter.files import replacing
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint
from exporter.quantization.schemes import QuantizedTensor


def lower(quantized: QuantizedCheckpoint, target: Target, out: Path) -> Artifact:
    """Write `out`/model.pte."""
    with quietly():
        if target.delegate == "coreml":
            exported = coreml_delegate().export_step(quantized, embedded(target))
        else:
            segments = Segments(quantized, target)
            exported = export_program(Program(quantized, target, segments))
        edge = exir.to_edge(
            exported,
            constant_methods=_constant_methods(quantized, target),
            compile_config=exir.EdgeCompileConfig(_check_ir_validity=False),
        )
        if target.delegate == "xnnpack":
            delegate(edge.exported_program(), segments)
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
    content = buffer.getbuffer()
    parts = store_embedding_once(content) if target.delegate == "xnnpack" else [content]
    with replacing(out / FILE_NAME) as file:
        for part in parts:
            file.write(part)
    return Artifact(out, target, FILES)


def _constant_methods(quantized: QuantizedCheckpoint, target: Target) -> dict[str, Any]:
    """The metadata that the official runners read (extension/llm/runner/constants.h)."""
    text_ends, xnnpack = quantized.eos_token_ids, target.delegate == "xnnpack"
    return {
        "enable_dynamic_shape": xnnpack,  # False: one token per call
        "get_max_context_len": target.max_context,
        "get_max_seq_len": longest_call(target) if xnnpack else target.max_context,
        "get_vocab_size": quantized.config.vocab_size,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": xnnpack and target.attention == "custom_sdpa",
        **({"get_bos_id": quantized.bos_token_id} if quantized.bos_token_id is not None else {}),
        **({"get_eos_ids": list(text_ends)} if text_ends else {}),
    }


def weights(
    artifact: Artifact, quantized: QuantizedCheckpoint
) -> Iterator[tuple[str, str, QuantizedTensor | Tensor]]:
    """Every weight decoded from the .pte: name, place in the file, codes and scales or floats."""
    if options_of(artifact).delegate == "xnnpack":
        yield from read_weights(open_contents(artifact.path / FILE_NAME), quantized)
        return
    with coreml_delegate().embedded_package(artifact.path / FILE_NAME) as package:
        from exporter.backends.coreml.lowering import package_weights

        yield from package_weights(package, quantized)


def differences(found: Artifact, expected: Artifact) -> Iterator[tuple[str, str]]:
    """How `found` differs from `expected`, as (place, what differs). Raises InputError."""
    files = [one.path / FILE_NAME for one in (found, expected)]
    yield from comparison.differences(*map(open_contents, files))
    if options_of(expected).delegate == "coreml":
        coreml_delegate()
        from exporter.backends.executorch.payload_comparison import payload_differences

        yield from payload_differences(*files)
