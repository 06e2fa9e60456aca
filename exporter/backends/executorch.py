"""ExecuTorch: a .pte that XNNPACK runs, with the waist's codes and scales untouched.

    mobilellm lower build/nano-int4 --target executorch -o build/nano

The program is small: an embedding, and between two attentions one XNNPACK call that holds all
the rest of a layer. `executorch_layers` says what is in such a call, `executorch_graph` writes
it down, `executorch_program` puts the program around it, `executorch_file` knows the bytes.
"""

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
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

    from exporter.backends.executorch_file import read_weights, store_embedding_once
    from exporter.backends.executorch_layers import LayerGraphs
    from exporter.backends.executorch_program import Program, delegate, export_program

from exporter.backends import Artifact
from exporter.errors import InputError
from exporter.files import replacing
from exporter.model import ModelConfig
from exporter.quantization.activations import Rounding, round_rows_to_int8
from exporter.quantization.integers import QuantizedTensor, Scheme
from exporter.quantization.waist import EMBEDDING, QuantizedCheckpoint
from exporter.recipe import ExecuTorchTarget, check_context

FILE_NAME = "model.pte"
PACKAGES = ("executorch", "torch")
FILES = (FILE_NAME,)


def check(config: ModelConfig, schemes: Mapping[str, Scheme], target: ExecuTorchTarget) -> None:
    """Refuse what XNNPACK or the model cannot do. Raises InputError."""
    check_context(config, target)
    for name, scheme in schemes.items():
        multiplied = name != EMBEDDING or config.tie_word_embeddings
        if multiplied and scheme.bits == 8 and scheme.group_size:
            raise InputError(
                f"{name}: {scheme}",
                "XNNPACK multiplies int8 weights with one scale a row only",
                "Use int8, or an int4 scheme",
            )


def rounding(
    schemes: Mapping[str, Scheme], target: ExecuTorchTarget, prompt: int
) -> Rounding | None:
    """XNNPACK's dynamic activations: int8, one scale a row."""
    return round_rows_to_int8


def largest_activation(target: ExecuTorchTarget) -> float | None:
    """Activations are float32."""
    return None


def lower(waist: QuantizedCheckpoint, target: ExecuTorchTarget, out: Path) -> Artifact:
    """Write `out`/model.pte."""
    check(waist.config, waist.schemes, target)
    with _quietly():
        exported = export_program(Program(waist, target))
        edge = exir.to_edge(
            exported,
            constant_methods=_constant_methods(waist, target),
            compile_config=exir.EdgeCompileConfig(_check_ir_validity=False),
        )
        graphs = LayerGraphs(waist, target)
        delegate(edge.exported_program(), graphs)
        edge._named_data_store.merge_named_data_store(
            graphs.named_data.get_named_data_store_output()
        )
        manager = edge.to_executorch(
            exir.ExecutorchBackendConfig(
                run_reinplace_pass=True,
                memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
            )
        )
        buffer = io.BytesIO()
        manager.write_to_file(buffer)
    with replacing(out / FILE_NAME) as file:
        for part in store_embedding_once(buffer.getbuffer()):
            file.write(part)
    return Artifact(out, target, FILES)


def _constant_methods(waist: QuantizedCheckpoint, target: ExecuTorchTarget) -> dict[str, Any]:
    """What the official runners ask the program (extension/llm/runner/constants.h)."""
    text_ends = waist.eos_token_ids
    return {
        "enable_dynamic_shape": True,
        "get_max_context_len": target.max_context,
        "get_max_seq_len": target.max_context,
        "get_vocab_size": waist.config.vocab_size,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": target.attention == "custom_sdpa",
        **({"get_bos_id": waist.bos_token_id} if waist.bos_token_id is not None else {}),
        **({"get_eos_ids": list(text_ends)} if text_ends else {}),
    }


def weights(
    artifact: Artifact, waist: QuantizedCheckpoint
) -> Iterator[tuple[str, str, QuantizedTensor | Tensor]]:
    """Every weight decoded out of the .pte: name, place in the file, codes and scales."""
    return read_weights(artifact.path / FILE_NAME, waist)


class ExecuTorchRunner:
    """The artifact in ExecuTorch's own runtime on this machine."""

    def __init__(self, path: Path) -> None:
        with _quietly():
            self._module = portable_lib._load_for_executorch(str(path))
            self._context = int(self._module.run_method("get_max_context_len", ())[0])
            self._vocab_size = int(self._module.run_method("get_vocab_size", ())[0])
        self._position = 0

    @property
    def context(self) -> int:
        return self._context

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    def prefill(self, tokens: list[int]) -> Tensor:
        self._position = 0
        return self._step(tokens)

    def decode(self, token: int) -> Tensor:
        return self._step([token])

    def _step(self, tokens: list[int]) -> Tensor:
        inputs = torch.tensor([tokens]), torch.tensor([self._position])
        with _quietly():
            logits: Tensor = self._module.run_method("forward", inputs)[0][0].clone()
        self._position += len(tokens)
        return logits


def load(artifact: Artifact) -> ExecuTorchRunner:
    """The artifact ready to run. The whole file is read, so that a short one is refused."""
    return ExecuTorchRunner(artifact.path / FILE_NAME)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep what the toolkit prints (warnings, its C++ log on file descriptor 2) off the screen."""
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
