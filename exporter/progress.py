"""The callbacks through which long work reports its progress; the command line shows it."""

from collections.abc import Callable

from devices.progress import Progress

__all__ = ("OnStep", "OnTensor", "Progress", "TensorCounter", "no_progress", "no_step")

#: A `Progress` of one stage: called with the steps done, their number, and a note for display.
OnStep = Callable[[int, int, str], None]
#: Called with a tensor's name when that tensor is done.
OnTensor = Callable[[str], None]


def no_progress(stage: str, done: int, total: int, note: str = "") -> None:
    """A `Progress` that shows nothing."""


def no_step(done: int, total: int, note: str) -> None:
    """An `OnStep` that shows nothing."""


class TensorCounter:
    """Counts the tensors of a stage for a `Progress`; called with the name of each."""

    def __init__(self, progress: Progress, stage: str, total: int) -> None:
        self._progress, self._stage, self._total, self._done = progress, stage, total, 0
        progress(stage, 0, total)

    def __call__(self, name: str) -> None:
        self._done = min(self._done + 1, self._total)
        self._progress(self._stage, self._done, self._total)
