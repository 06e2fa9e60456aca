"""One finding of a gate: a figure, its limit, and whether the limit holds."""

from dataclasses import dataclass

from exporter.gate.quantities import show

BUDGET, BASELINE = "budget", "baseline"


@dataclass(frozen=True)
class Finding:
    """One limit of the budget, or one comparison with the baseline (`against`).

    `target` and `device` are None where a limit has none; `device` is a CPU where instructions were
    counted. `value` is None where nothing was measured, `limit` where there is nothing to compare
    with. `unit` is that of both: bytes, ms, tokens/s, instructions, % for a share from 0 to 1, or
    ''. The value may be at most the limit, or at least the limit without `at_most`.
    """

    against: str
    name: str
    target: str | None
    device: str | None
    value: float | None
    limit: float | None
    unit: str
    at_most: bool
    passed: bool
    note: str = ""

    @property
    def place(self) -> str:
        """The target and the device as text."""
        return " on ".join(part for part in (self.target, self.device) if part) or "bundle"

    def shown_value(self) -> str:
        """The value as text."""
        if self.value is None:
            return "not measured" if self.against == BUDGET else "not compared"
        return show(self.value, self.unit)

    def shown_limit(self) -> str:
        """The limit as text."""
        if self.limit is None:
            return ""
        return f"at {'most' if self.at_most else 'least'} {show(self.limit, self.unit)}"
