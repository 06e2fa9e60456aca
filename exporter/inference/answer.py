"""Stream the answer of a model to a prompt, as `mobilellm generate` does."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

from exporter.inference.generation import Generation, Sampling
from exporter.inference.loaded_model import open_model
from exporter.text.tokenizer import TextTokenizer, load_tokenizer


@dataclass(frozen=True)
class Answer:
    """An answer in progress. Iterate over its text, then read `generation` and `seconds`."""

    kind: str
    prompt_text: str
    generation: Generation
    tokenizer: TextTokenizer
    load_seconds: float

    def __iter__(self) -> Iterator[str]:
        return (piece for _, piece in self.tokenizer.stream(self.generation))

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time of "load", "prefill" and "decode"."""
        return {"load": self.load_seconds, **self.generation.seconds}


def begin_answer(
    source: str,
    target: str | None,
    prompt: str,
    sampling: Sampling,
    raw: bool = False,
    system: str | None = None,
) -> Answer:
    """Load the model of `source` and encode the prompt, with the chat template unless `raw`.

    `source` is a bundle, an artifact, a quantized checkpoint or a checkpoint. Raises InputError.
    """
    started = time.perf_counter()
    model = open_model(source, target)
    loaded = time.perf_counter() - started
    tokenizer = load_tokenizer(model.tokenizer_folder)
    text = tokenizer.prompt_text(prompt, raw=raw, system=system)
    generation = Generation(model.runner, tokenizer.encode(text), model.eos_token_ids, sampling)
    return Answer(model.kind, text, generation, tokenizer, loaded)
