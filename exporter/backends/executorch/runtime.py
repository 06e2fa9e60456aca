"""Run the .pte of an ExecuTorch artifact, without the toolkit that writes it.

The toolkit takes seconds to import, also by way of `portable_lib`, whose names are those of `_C`.
"""

import contextlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import executorch.kernels.quantized  # noqa: F401  # registers the quantized kernels
import torch
from executorch.extension.pybindings import _C
from torch import Tensor

from exporter.backends import Artifact, Runner, backend
from exporter.backends.executorch import FILE_NAME, Target, embedded, interpreted

#: The most tokens of a prompt that are read in one call, where the program takes more.
_CHUNK = 512


class ExecuTorchRunner:
    """A `Runner` of a .pte in ExecuTorch's own runtime. It reads a prompt in chunks."""

    def __init__(self, path: Path) -> None:
        with quietly():
            _load_custom_kernels()
            self._module = _C._load_for_executorch(str(path))
            self.context = int(self._module.run_method("get_max_context_len", ())[0])
            self.vocab_size = int(self._module.run_method("get_vocab_size", ())[0])
            longest = int(self._module.run_method("get_max_seq_len", ())[0])
        self._chunk = max(1, min(_CHUNK, longest))
        self._position = 0

    def prefill(self, tokens: list[int]) -> Tensor:
        self._position = 0
        for start in range(0, len(tokens), self._chunk):
            logits = self._read(tokens[start : start + self._chunk])
        return logits

    def decode(self, token: int) -> Tensor:
        return self._read([token])

    def _read(self, tokens: list[int]) -> Tensor:
        logits = self.run(tokens, self._position)
        self._position += len(tokens)
        return logits

    def run(self, tokens: list[int], position: int) -> Tensor:
        """Read `tokens` from `position` on. Returns the last logits, float32 [vocab_size]."""
        inputs = torch.tensor([tokens]), torch.tensor([position])
        with quietly():
            logits: Tensor = self._module.run_method("forward", inputs)[0]
        return logits.reshape(-1, self.vocab_size)[-1].float().clone()


def load(artifact: Artifact, variant: str = "") -> Runner:
    """The artifact in ExecuTorch's runtime.

    The Core ML delegate runs on a Mac only, which is untested, since none was available. Elsewhere
    its package runs in the reference interpreter, and so it does as `variant`.
    """
    if options_of(artifact).delegate == "xnnpack":
        return ExecuTorchRunner(artifact.path / FILE_NAME)
    if variant or interpreted(options_of(artifact)):
        return _interpret(artifact, variant)
    program = ExecuTorchRunner(artifact.path / FILE_NAME)
    runner: Runner = coreml_delegate().StepRunner(program.run, program.context, program.vocab_size)
    return runner


def cross_checks(artifact: Artifact) -> tuple[str, ...]:
    """Those of Core ML for its delegate. None for XNNPACK."""
    target = options_of(artifact)
    if target.delegate == "xnnpack":
        return ()
    others: tuple[str, ...] = coreml_delegate().cross_checks(
        artifact.path / FILE_NAME, embedded(target)
    )
    return others


def _interpret(artifact: Artifact, variant: str) -> Runner:
    path, context = artifact.path / FILE_NAME, artifact.target.max_context
    runner: Runner = coreml_delegate().interpret_step(path, context, variant)
    return runner


def options_of(artifact: Artifact) -> Target:
    """The target, as this format's."""
    assert isinstance(artifact.target, Target)
    return artifact.target


def coreml_delegate() -> ModuleType:
    """The module of the Core ML delegate. Raises MissingExtraError without coremltools."""
    backend("coreml")
    with quietly():
        from exporter.backends.executorch import coreml_delegate as module
    return module


def _load_custom_kernels() -> None:
    """Register the kernels of ``custom_sdpa`` and its cache, as the toolkit's `custom_ops` does."""
    spec = importlib.util.find_spec("executorch.extension.llm.custom_ops")
    assert spec is not None and spec.submodule_search_locations
    (library,) = Path(spec.submodule_search_locations[0]).glob("*custom_ops_aot_lib.*")
    torch.ops.load_library(library)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
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
