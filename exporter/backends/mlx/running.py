"""Run an MLX folder in mlx-lm's model on this machine: on the CPU, and in float32.

Scales, biases and float weights are converted to float32, which is exact. So the result shows what
the folder means, on every machine alike; it does not show how a GPU rounds in float16. MLX's own
float16 on a CPU of Intel or AMD would not show that either: it is twelve times slower, and adds up
a product in float16 (``_qmm_t`` in MLX's mlx/backend/cpu/quantized.cpp), which no GPU does.
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
from torch import Tensor

from exporter.backends import check_fits
from exporter.backends.mlx import FILE_NAME
from exporter.backends.mlx.contents import open_contents
from exporter.errors import InputError
from exporter.foreign import JSON_BYTES, present

#: Tokens of a prompt that are read at once.
_CHUNK = 256


def load(folder: Path, context: int) -> "MlxRunner":
    """The model of a folder that `open_contents` accepts. Raises InputError."""
    contents = open_contents(folder)
    _check_folder(folder)
    mx.set_default_device(mx.cpu)
    model, _ = load_model(folder, lazy=True, trust_remote_code=False)
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    return MlxRunner(model, context, contents.config.vocab_size)


def _check_folder(folder: Path) -> None:
    """Refuse other files that mlx-lm would read: more weights, and other descriptions of them."""
    for path in sorted(folder.iterdir()):
        weights = path.match("model*.safetensors") and path.name != FILE_NAME
        if weights or path.name == "hf_quant_config.json":
            raise InputError(path, "does not belong to this folder", "Remove it")
    present(folder / "generation_config.json", JSON_BYTES)


class MlxRunner:
    """A `Runner` in MLX. mlx-lm reads a prompt in the same way: all but its last token in chunks,
    without logits."""

    def __init__(self, model: Any, context: int, vocab_size: int) -> None:
        self._model, self.context, self.vocab_size = model, context, vocab_size
        self._cache = make_prompt_cache(model)
        self._position = 0

    def prefill(self, tokens: list[int]) -> Tensor:
        self._cache, self._position = make_prompt_cache(self._model), 0
        self._check(tokens)
        for start in range(0, len(tokens) - 1, _CHUNK):
            self._read(tokens[start : min(start + _CHUNK, len(tokens) - 1)])
            mx.eval([layer.state for layer in self._cache])
        return self._logits(tokens[-1])

    def decode(self, token: int) -> Tensor:
        self._check([token])
        return self._logits(token)

    def _check(self, tokens: list[int]) -> None:
        """Refuse tokens that MLX would look up beyond the end of the embedding."""
        end = self._position + len(tokens)
        check_fits(end, self.context)
        if not all(0 <= token < self.vocab_size for token in tokens):
            raise InputError("tokens", f"have an id outside the vocabulary of {self.vocab_size}")
        self._position = end

    def _read(self, tokens: list[int]) -> Any:
        """The logits of these tokens, which MLX computes when they are used."""
        return self._model(mx.array([tokens]), cache=self._cache)

    def _logits(self, token: int) -> Tensor:
        logits = self._read([token])[0, -1].astype(mx.float32)
        return torch.from_numpy(np.array(logits))
