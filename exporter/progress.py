"""How long work tells of its steps, to whoever shows them."""

from typing import Protocol


class Progress(Protocol):
    """Told of each step: the stage's name, how many of its steps are done, of how many, and what
    else is worth showing."""

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None: ...


def no_progress(stage: str, done: int, total: int, note: str = "") -> None:
    """Show nothing."""


class TensorCounter:
    """Counts the tensors of a stage for a `Progress`; called with the name of each."""

    def __init__(self, progress: Progress, stage: str, total: int) -> None:
        self._progress, self._stage, self._total, self._done = progress, stage, total, 0
        progress(stage, 0, total)

    def __call__(self, name: str) -> None:
        self._done = min(self._done + 1, self._total)
        self._progress(self._stage, self._done, self._total)
