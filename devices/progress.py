"""The callback through which long work reports its progress."""

from typing import Protocol


class Progress(Protocol):
    """Called at each step of a stage, of which `done` of `total` are complete.

    `note` is a short text for display.
    """

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None: ...
