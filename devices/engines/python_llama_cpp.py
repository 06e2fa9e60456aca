"""llama.cpp for ``python_runner.py``, which loads this file from its own folder.

It has llama.cpp's defaults: a cache of float16, prompts in parts of 512 tokens, logits of the last
token only, weights repacked for the CPU while they are loaded.

One default is left out: on a CPU with AMX (servers) the weights stay as they are. llama.cpp would
multiply prompts in AMX there, and crash if a GCC older than 12.4 compiled it, since that GCC leaves
the table of ``ldtilecfg`` empty (GCC bug 114098).
"""

import ctypes
import importlib
import sys
from pathlib import Path
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
        model = load_model(library, path, mapped=options.load != "file")
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


def load_model(library: Any, path: str, mapped: bool) -> Any:
    """llama.cpp's model of a file, mapped or read. Raises RuntimeError where it refuses the file,
    after it said the reason."""
    options = library.llama_model_default_params()
    if hasattr(options, "load_mode"):
        mode = library.LLAMA_LOAD_MODE_MMAP if mapped else library.LLAMA_LOAD_MODE_NONE
        options.load_mode = mode
    else:  # llama.cpp before 2026
        options.use_mmap = mapped
    if has_amx():
        options.use_extra_bufts = False
    model = library.llama_model_load_from_file(path.encode(), options)
    if not model:
        raise RuntimeError("no model of llama.cpp")
    return model


def has_amx() -> bool:
    """Whether this is a Linux machine whose CPU has AMX."""
    try:
        return " amx_tile" in Path("/proc/cpuinfo").read_text()
    except OSError:  # not a Linux machine
        return False


def _print_errors(level: int, text: bytes, _data: ctypes.c_void_p) -> None:
    if level == _ERROR:
        sys.stderr.write(text.decode("utf-8", "replace"))
