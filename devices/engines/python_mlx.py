"""MLX for ``python_runner.py``, which loads this file from its own folder.

It runs on MLX's default device: the GPU of a Mac, elsewhere the CPU with one thread.
"""

import importlib
import json
from pathlib import Path
from typing import Any, ClassVar

#: Bytes that a config.json may have.
_MOST_BYTES = 1 << 20
#: Keys of a config.json with which a client imports code of the folder.
_CODE = ("model_file", "auto_map")


class Runtime:
    """A folder that `mlx_lm` opens, by the path of its weights. MLX computes when a value is asked
    for, so each step asks for the logits, and for the cache of all that it reads."""

    MODULES: ClassVar[tuple[str, ...]] = (
        "numpy",
        "mlx.core",
        "mlx_lm.utils",
        "mlx_lm.models.cache",
    )
    whole_cache, chunk = True, 2048  # mlx_lm reads prompts in parts of this size

    def __init__(self, path: str, options: Any) -> None:
        self.numpy, self.core, loading, self.caches = map(importlib.import_module, self.MODULES)
        folder = Path(path).parent
        config = read_config(folder / "config.json")
        self.model, _ = loading.load_model(folder)  # reads all weights
        self.cache = self.caches.make_prompt_cache(self.model)
        positions = int(config["max_position_embeddings"])
        self.context = min(options.context, positions) if options.context else positions
        self.vocab_size: int | None = int(config["vocab_size"])

    def step(self, tokens: list[int], start: int) -> Any:
        core = self.core
        if excess := self.cache[0].offset - start:
            self.caches.trim_prompt_cache(self.cache, excess)
        *before, last = tokens
        if before:  # mlx_lm computes no logits of these either
            self.model(core.array([before]), cache=self.cache)
            core.eval([layer.state for layer in self.cache])
            core.clear_cache()
        logits = self.model(core.array([[last]]), cache=self.cache)[0, -1].astype(core.float32)
        core.eval(logits, [layer.state for layer in self.cache])
        return self.numpy.array(logits)

    def finish(self, trace: str) -> None:
        raise NotImplementedError("MLX records no operators")


def read_config(path: Path) -> dict[str, Any]:
    """A config.json. Raises ValueError where a client would import code of the folder for it."""
    with path.open("rb") as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ValueError(f"config.json has more than {_MOST_BYTES} bytes")
    config: dict[str, Any] = json.loads(content)
    if asked := [key for key in _CODE if key in config]:
        raise ValueError(f"config.json asks for code of the folder: {asked[0]}")
    return config
