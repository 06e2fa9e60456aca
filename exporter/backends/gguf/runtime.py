"""Run a GGUF file in llama.cpp on the CPU, through the C functions of llama-cpp-python.

Unless the target asks for another cache, it and the attention are llama.cpp's defaults, which its
clients use too: float16 keys and values, and flash attention. A prompt is read in chunks.

Weights are read as the file has them (`use_extra_bufts` is off). llama.cpp would repack them for
AMX where the CPU has it, and crash if a GCC older than 12.4 compiled it: that GCC leaves the table
of ``ldtilecfg`` empty (GCC bug 114098).
"""

import ctypes
import weakref
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch
from torch import Tensor

from exporter.backends.gguf import Target
from exporter.errors import InputError

#: The most tokens of a prompt that are read at once.
_CHUNK = 512
_ERROR = 4  # GGML_LOG_LEVEL_ERROR
_REMEDY = "Get the file again, or lower the model again"


class LlamaRunner:
    """A `Runner` in llama.cpp, with the cache of the target. Raises InputError for a file that
    llama.cpp refuses, with its last messages."""

    def __init__(self, path: Path, target: Target) -> None:
        _log.clear()
        llama_cpp.llama_log_set(_log_callback, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers, options.use_extra_bufts = 0, False
        model = llama_cpp.llama_model_load_from_file(bytes(path), options)
        if not model:
            raise _refused(path, "load it")
        weakref.finalize(self, llama_cpp.llama_model_free, model)
        self._context = _open_context(path, model, target)
        weakref.finalize(self, llama_cpp.llama_free, self._context)
        vocabulary = llama_cpp.llama_model_get_vocab(model)
        self.context = target.max_context
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self._path = path

    def prefill(self, tokens: list[int]) -> Tensor:
        """Empty the cache and read these tokens: logits float32 [vocab_size]."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        for start in range(0, len(tokens), _CHUNK):
            self._read(tokens[start : start + _CHUNK])
        return self._logits()

    def decode(self, token: int) -> Tensor:
        """Read one more token: logits float32 [vocab_size]."""
        self._read([token])
        return self._logits()

    def _read(self, tokens: list[int]) -> None:
        content = (llama_cpp.llama_token * len(tokens))(*tokens)
        batch = llama_cpp.llama_batch_get_one(content, len(tokens))
        if llama_cpp.llama_decode(self._context, batch):
            raise _refused(self._path, f"read {len(tokens)} tokens")

    def _logits(self) -> Tensor:
        found: Any = llama_cpp.llama_get_logits_ith(self._context, -1)
        if not found:
            raise _refused(self._path, "give logits")
        values = np.ctypeslib.as_array(found, shape=(self.vocab_size,))
        return torch.from_numpy(values.copy())


def _open_context(path: Path, model: Any, target: Target) -> Any:
    options = llama_cpp.llama_context_default_params()
    options.n_ctx = target.max_context
    options.n_batch = options.n_ubatch = min(_CHUNK, target.max_context)
    if target.cache == "float32":
        options.type_k = options.type_v = llama_cpp.GGML_TYPE_F32
        options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED  # computes in float16
    options.n_threads = options.n_threads_batch = torch.get_num_threads()
    opened = llama_cpp.llama_init_from_model(model, options)
    if not opened:
        raise _refused(path, f"make a context of {target.max_context} tokens")
    return opened


#: What llama.cpp reported as an error since the last model was loaded.
_log: list[str] = []


def _keep_error(level: int, text: bytes, _: object) -> None:
    if level == _ERROR:
        _log.append(text.decode("utf-8", "backslashreplace").strip())


#: llama.cpp calls it later, so it must not be collected.
_log_callback: Any = llama_cpp.llama_log_callback(_keep_error)


def _refused(path: Path, action: str) -> InputError:
    reason = "; ".join(_log[-2:]) or "without a message"
    return InputError(path, f"llama.cpp cannot {action} ({reason})", _REMEDY)
