"""ExecuTorch's wheel for ``python_runner.py``, which loads this file from its own folder."""

import importlib
from pathlib import Path
from typing import Any, ClassVar


class Runtime:
    """ExecuTorch's wheel with torch, for this machine where the native runner cannot be built or
    lacks the delegate: a Mac."""

    #: The last two register their operators.
    MODULES: ClassVar[tuple[str, ...]] = (
        "torch",
        "executorch.extension.pybindings.portable_lib",
        "executorch.kernels.quantized",
        "executorch.extension.llm.custom_ops.custom_ops",
    )
    whole_cache, chunk = True, 128

    def __init__(self, path: str, options: Any) -> None:
        self.torch, portable_lib, *_ = map(importlib.import_module, self.MODULES)
        self.torch.set_num_threads(options.threads)
        portable_lib._unsafe_reset_threadpool(options.threads)
        self.module = portable_lib._load_for_executorch(path, enable_etdump=bool(options.trace))
        self.context = int(self.module.run_method("get_max_context_len", ())[0])
        self.vocab_size: int | None = int(self.module.run_method("get_vocab_size", ())[0])
        self.longest = int(self.module.run_method("get_max_seq_len", ())[0])
        self.step([0], 0)  # the first step loads the method

    def step(self, tokens: list[int], start: int) -> Any:
        while len(tokens) > self.longest:  # a call takes no more
            self.step(tokens[: self.longest], start)
            tokens, start = tokens[self.longest :], start + self.longest
        inputs = self.torch.tensor([tokens]), self.torch.tensor([start])
        return self.module.run_method("forward", inputs)[0][0].numpy()

    def finish(self, trace: str) -> None:
        self.module.write_etdump_result_to_file(trace, trace + ".debug")
        Path(trace + ".debug").unlink(missing_ok=True)
