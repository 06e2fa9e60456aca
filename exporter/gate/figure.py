"""A figure of a bundle and its name: what a budget limits and a baseline compares."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from devices.session_state import PHASE_NAMES

#: Kinds of figures, as the tolerances of a budget name them. Of the others, `UNDELEGATED` has a
#: tolerance of 0, and those in `NOT_COMPARED` have none.
SIZE, LATENCY, MEMORY, INSTRUCTIONS = "size", "latency", "memory", "instructions"
UNDELEGATED, ARCHIVE, COVERAGE = "undelegated", "archive", "coverage"
NOT_COMPARED = (ARCHIVE, COVERAGE)


@dataclass(frozen=True)
class Figure:
    """One figure of a bundle.

    `devices` are the names of the device, or the CPU whose instructions were counted. `repeats` has
    the raw samples of each repeat, and `solved` has 1 for each solved problem and 0 for each other.
    `error` is the standard error of `value`, or the error of the clock in milliseconds. `tokens` is
    the number of tokens that a time is for, `cpu_share` the cores that its process had on average
    (0 if unknown). Figures with other `conditions` cannot be compared.
    `parts` add up to the value. `unusable` says why no limit may be judged by it.
    """

    name: str
    kind: str
    value: float
    unit: str
    target: str | None = None
    devices: tuple[str, ...] = ()
    conditions: Mapping[str, str] = field(default_factory=dict)
    repeats: Sequence[Sequence[float]] = ()
    solved: Sequence[int] = ()
    error: float = 0.0
    cpu_share: float = 0.0
    tokens: int = 0
    parts: Mapping[str, float] = field(default_factory=dict)
    unusable: str = ""

    @property
    def device(self) -> str | None:
        """The device or CPU, None for a figure of the files alone."""
        return self.devices[0] if self.devices else None


@dataclass(frozen=True)
class Gap:
    """Something that a measurement left out: of a target on a device, and why. `name` is that of
    the figure, '' for all."""

    target: str
    devices: tuple[str, ...]
    name: str
    reason: str

    def leaves_out(self, figure: "Figure") -> bool:
        """Whether a figure of this name, target and devices is missing for this reason."""
        return (
            self.target == figure.target
            and bool(set(self.devices) & set(figure.devices))
            and self.name in ("", figure.name)
        )


@dataclass(frozen=True)
class Figures:
    """All figures of a bundle, and what was left out."""

    figures: Sequence[Figure]
    gaps: Sequence[Gap]


def prefill(tokens: int) -> str:
    """The name of the figure for a prompt of so many tokens."""
    return PHASE_NAMES["prefill"].format(tokens)


def decode(depth: int) -> str:
    """The name of the figure for one token after so many."""
    return PHASE_NAMES["decode"].format(depth)


def counted(name: str) -> str:
    """The name of a figure in instructions."""
    return f"instructions, {name}"


def on_data(key: str, data: str) -> str:
    """The name of a figure on a data file."""
    return f"{key} on {data}"
