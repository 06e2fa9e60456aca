"""Generate text with any runner, greedily or by sampling, one token at a time."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from exporter.backends import Runner
from exporter.errors import InputError
from exporter.inference.sampling import sample

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. `temperature` 0 is greedy.

    `top_p` keeps the most likely tokens that together have this share. Raises InputError for values
    out of range.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        problems = {
            "--max-new-tokens": (self.max_new_tokens >= 1, "1 or more"),
            "--temperature": (0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            "--top-p": (0 < self.top_p <= 1, "a share above 0 and up to 1"),
            "--seed": (0 <= self.seed < 2**63, "a whole number from 0 below 2^63"),
        }
        for flag, (right, wanted) in problems.items():
            if not right:
                value = getattr(self, flag[2:].replace("-", "_"))
                raise InputError(flag, f"{value} is out of range", f"Give {wanted}")


@dataclass
class Generation:
    """A generation in progress. Iterate over its token ids, then read how it ended.

    `end_ids` are the tokens that end a text. `seconds` has the time of "prefill" and "decode".
    Raises InputError for a prompt that is empty, too long, or not of the model's vocabulary.
    """

    runner: Runner
    prompt: Sequence[int]
    end_ids: Sequence[int]
    sampling: Sampling
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason = "length"
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.prompt:
            raise InputError("prompt", "has no tokens", "Give some text")
        largest = max(self.prompt)
        if largest >= self.runner.vocab_size:
            raise InputError(
                "prompt",
                f"gives token {largest}, outside the model's vocabulary of "
                f"{self.runner.vocab_size}",
                "The tokenizer does not belong to this model",
            )
        if len(self.prompt) >= self.runner.context:
            raise InputError(
                "prompt",
                f"has {len(self.prompt)} tokens, the context holds {self.runner.context}",
                "Shorten it, or lower the model with a larger max_context",
            )

    def __iter__(self) -> Iterator[int]:
        """The new token ids, without the token that ends the text."""
        choose = _chooser(self.sampling)
        room = self.runner.context - len(self.prompt)
        started = time.perf_counter()
        logits = self.runner.prefill(list(self.prompt))
        first = time.perf_counter()
        self.seconds = {"prefill": first - started, "decode": 0.0}
        for count in range(1, min(self.sampling.max_new_tokens, room + 1) + 1):
            token = choose(logits)
            if token in self.end_ids:
                self.finish_reason = "stop"
                return
            self.tokens.append(token)
            yield token
            if count <= room and count < self.sampling.max_new_tokens:
                before = time.perf_counter()
                logits = self.runner.decode(token)
                self.seconds["decode"] += time.perf_counter() - before


def _chooser(sampling: Sampling) -> Callable[[Tensor], int]:
    """The function from logits [vocab_size] to the next token."""
    if sampling.temperature == 0:
        return lambda logits: int(logits.argmax())
    generator = torch.Generator().manual_seed(sampling.seed)

    def choose(logits: Tensor) -> int:
        below = logits.double() - logits.max()  # avoids overflow at small temperatures
        return sample(below[None], sampling.temperature, sampling.top_p, generator)[0]

    return choose
