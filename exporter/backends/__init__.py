"""One module for each mobile format, all with the same functions; see `backend`.

- ``check(config, schemes, target)``: refuse what the format cannot hold, before any work.
- ``lower(quantized, target, out) -> Artifact``: repack codes and scales; choose nothing again.
- ``load(artifact) -> Runner``: the artifact in its own runtime on this machine.
- ``weights(artifact, quantized)``: codes and scales decoded out of the artifact, tensor by tensor.

- ``rounding(schemes, target, prompt)``: how its runtime rounds activations where the first
  `prompt` tokens are read at once, or None.

- ``largest_activation(target, which)``: beyond it activations overflow; None in float32. `which`
  is input, output, keys, values or scores.

- ``interpret(artifact) -> Runner | None``: a second opinion, where `load` runs a toolkit's own
  runtime and we have an interpreter of the format.

- ``packages(target)``: the distributions whose versions decide the bytes.

Also ``FILES``, every file it may write, the first one first.
"""

import importlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Protocol

from torch import Tensor

from exporter.errors import MissingExtraError
from exporter.recipe import Target

#: Target → the module that owns its toolkit, and the extra that installs the toolkit.
BACKENDS = {
    "executorch": ("exporter.backends.executorch.lowering", "executorch"),
    "onnx": ("exporter.backends.onnx.lowering", "onnx"),
    "coreml": ("exporter.backends.coreml.lowering", "coreml"),
}


@dataclass(frozen=True)
class Artifact:
    """One lowered model: `files` in the folder `path`, and what it was lowered for."""

    path: Path
    target: Target
    files: tuple[str, ...]


class Runner(Protocol):
    """A model with its cache. Logits are float32 [vocab_size], of the last token."""

    @property
    def context(self) -> int:
        """How many positions the cache holds."""

    @property
    def vocab_size(self) -> int:
        """How many tokens the model knows."""

    def prefill(self, tokens: list[int]) -> Tensor:
        """Start a new text with these tokens."""

    def decode(self, token: int) -> Tensor:
        """Continue the text by one token."""


def backend(name: str) -> ModuleType:
    """The module of a target; raises MissingExtraError where its toolkit is absent."""
    module, extra = BACKENDS[name]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("exporter"):
            raise
        raise MissingExtraError(error.name or extra, extra) from error
