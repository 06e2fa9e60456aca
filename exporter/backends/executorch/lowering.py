"""Write the .pte of an ExecuTorch artifact, read its weights back, and run it."""

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for _name in ("torch", "torchao"):
        logging.getLogger(_name).setLevel(logging.ERROR)
    from executorch import exir
    from executorch.exir.passes import MemoryPlanningPass
    from executorch.extension.pybindings import portable_lib

    from exporter.backends.executorch.file import read_weights, store_embedding_once
    from exporter.backends.executorch.program import Program, delegate, export_program
    from exporter.backends.executorch.segments import Segments

from exporter.backends import Artifact, Runner, backend
from exporter.backends.executorch import FILE_NAME, FILES, Target, embedded
from exporter.files import replacing
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint
from exporter.quantization.schemes import QuantizedTensor


def lower(quantized: QuantizedCheckpoint, target: Target, out: Path) -> Artifact:
    """Write `out`/model.pte."""
    with _quietly():
        if target.delegate == "coreml":
            exported = _coreml().export_step(quantized, embedded(target))
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
    text_ends = quantized.eos_token_ids
    return {
        "enable_dynamic_shape": target.delegate == "xnnpack",  # False: one token per call
        "get_max_context_len": target.max_context,
        "get_max_seq_len": target.max_context,
        "get_vocab_size": quantized.config.vocab_size,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": target.delegate == "xnnpack"
        and target.attention == "custom_sdpa",
        **({"get_bos_id": quantized.bos_token_id} if quantized.bos_token_id is not None else {}),
        **({"get_eos_ids": list(text_ends)} if text_ends else {}),
    }


def weights(
    artifact: Artifact, quantized: QuantizedCheckpoint
) -> Iterator[tuple[str, str, QuantizedTensor | Tensor]]:
    """Every weight decoded from the .pte: name, place in the file, codes and scales or floats."""
    if _target_of(artifact).delegate == "xnnpack":
        yield from read_weights(artifact.path / FILE_NAME, quantized)
        return
    with _coreml().embedded_package(artifact.path / FILE_NAME) as package:
        from exporter.backends.coreml.lowering import package_weights

        yield from package_weights(package, quantized)


class ExecuTorchRunner:
    """A `Runner` of a .pte in ExecuTorch's own runtime."""

    def __init__(self, path: Path) -> None:
        with _quietly():
            self._module = portable_lib._load_for_executorch(str(path))
            self.context = int(self._module.run_method("get_max_context_len", ())[0])
            self.vocab_size = int(self._module.run_method("get_vocab_size", ())[0])
        self._position = 0

    def prefill(self, tokens: list[int]) -> Tensor:
        self._position = 0
        return self._read(tokens)

    def decode(self, token: int) -> Tensor:
        return self._read([token])

    def _read(self, tokens: list[int]) -> Tensor:
        logits = self.run(tokens, self._position)
        self._position += len(tokens)
        return logits

    def run(self, tokens: list[int], position: int) -> Tensor:
        """Read `tokens` from `position` on. Returns the last logits, float32 [vocab_size]."""
        inputs = torch.tensor([tokens]), torch.tensor([position])
        with _quietly():
            logits: Tensor = self._module.run_method("forward", inputs)[0]
        return logits.reshape(-1).float().clone()


def load(artifact: Artifact, variant: str = "") -> Runner:
    """The artifact in ExecuTorch's runtime.

    The Core ML delegate runs on a Mac only, which is untested, since none was available. Elsewhere
    its package runs in the reference interpreter, and so it does as `variant`.
    """
    if _target_of(artifact).delegate == "xnnpack":
        return ExecuTorchRunner(artifact.path / FILE_NAME)
    if variant or sys.platform != "darwin":
        return _interpret(artifact, variant)
    program = ExecuTorchRunner(artifact.path / FILE_NAME)
    runner: Runner = _coreml().StepRunner(program.run, program.context, program.vocab_size)
    return runner


def cross_checks(artifact: Artifact) -> tuple[str, ...]:
    """Those of Core ML for its delegate. None for XNNPACK."""
    target = _target_of(artifact)
    if target.delegate == "xnnpack":
        return ()
    others: tuple[str, ...] = _coreml().cross_checks(embedded(target))
    return others


def _interpret(artifact: Artifact, variant: str) -> Runner:
    path, context = artifact.path / FILE_NAME, artifact.target.max_context
    runner: Runner = _coreml().interpret_step(path, context, variant)
    return runner


def _target_of(artifact: Artifact) -> Target:
    assert isinstance(artifact.target, Target)
    return artifact.target


def _coreml() -> ModuleType:
    """The module of the Core ML delegate. Raises MissingExtraError without coremltools."""
    backend("coreml")
    with _quietly():
        from exporter.backends.executorch import coreml_delegate
    return coreml_delegate


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Suppress the toolkit's warnings and its C++ log, which goes to file descriptor 2."""
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
