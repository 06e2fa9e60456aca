"""llama.cpp for ``python_runner.py``, which loads this file from its own folder.

It has llama.cpp's defaults: a cache of float16, prompts in parts of 512 tokens, logits of the last
token only, weights repacked for the CPU while they are loaded.
"""

import ctypes
import importlib
import sys
from typing import Any, ClassVar

#: The level of an error in llama.cpp's log.
_ERROR = 4


class Runtime:
    """A .gguf in the library of `llama-cpp-python`, called as its C programs call it."""

    MODULES: ClassVar[tuple[str, ...]] = ("numpy", "llama_cpp")
    whole_cache, chunk = True, 512

    def __init__(self, path: str, options: Any) -> None:
        self.numpy, library = map(importlib.import_module, self.MODULES)
        self.library = library
        self.log = library.llama_log_callback(_print_errors)  # kept: C calls it
        library.llama_log_set(self.log, None)
        library.llama_backend_init()
        load = library.llama_model_default_params()
        mapped = options.load != "file"
        if hasattr(load, "load_mode"):
            mode = library.LLAMA_LOAD_MODE_MMAP if mapped else library.LLAMA_LOAD_MODE_NONE
            load.load_mode = mode
        else:  # llama.cpp before 2026
            load.use_mmap = mapped
        model = library.llama_model_load_from_file(path.encode(), load)
        if not model:
            raise RuntimeError("no model of llama.cpp")
        trained = library.llama_model_n_ctx_train(model)
        self.context = min(options.context, trained) if options.context else trained
        use = library.llama_context_default_params()
        use.n_ctx = self.context
        use.n_threads = use.n_threads_batch = options.threads
        use.n_batch = use.n_ubatch = self.chunk
        self.state = library.llama_init_from_model(model, use)
        if not self.state:
            raise RuntimeError("no room for the context")
        self.memory = library.llama_get_memory(self.state)
        vocabulary = library.llama_model_get_vocab(model)
        self.vocab_size: int | None = library.llama_vocab_n_tokens(vocabulary)
        self.filled = 0

    def step(self, tokens: list[int], start: int) -> Any:
        library = self.library
        if start < self.filled:  # what was written there is forgotten
            library.llama_memory_seq_rm(self.memory, 0, start, -1)
        given = (library.llama_token * len(tokens))(*tokens)
        code = library.llama_decode(self.state, library.llama_batch_get_one(given, len(tokens)))
        if code:
            raise RuntimeError(f"llama_decode ended with {code}")
        self.filled = start + len(tokens)
        logits = library.llama_get_logits_ith(self.state, -1)
        return self.numpy.ctypeslib.as_array(logits, (self.vocab_size,))

    def finish(self, trace: str) -> None:
        raise NotImplementedError("llama.cpp records no operators")


def _print_errors(level: int, text: bytes, _data: ctypes.c_void_p) -> None:
    if level == _ERROR:
        sys.stderr.write(text.decode("utf-8", "replace"))
