"""The recipe's `quantization` section."""

from typing import Literal

from pydantic import Field

from exporter.quantization.schemes import Scheme, parse_scheme
from exporter.settings import Section


class Quantization(Section):
    """Schemes as text (``int4-g32``, ``int8``, ``float``); `overrides` maps patterns of names to
    schemes.

    With a `budget` (``5.3 bits`` per weight, or ``90 MB``, both including scales) the most
    sensitive weights are stored as int8, as far as the budget allows.
    """

    linear: str = "int4-g32"
    embedding: str = "int4-g32"
    method: Literal["absmax", "mse", "gptq", "distill"] = "mse"
    overrides: dict[str, str] = Field(default_factory=dict)
    budget: str = ""

    @property
    def calibrated(self) -> bool:
        """Whether calibration text is needed."""
        return self.method in ("gptq", "distill") or bool(self.budget)

    def schemes(self) -> tuple[Scheme, Scheme, dict[str, Scheme]]:
        """The schemes of linear layers, of the embedding, and of the overrides by pattern. Raises
        InputError."""
        return (
            parse_scheme(self.linear, "quantization.linear"),
            parse_scheme(self.embedding, "quantization.embedding"),
            {p: parse_scheme(s, f"quantization.overrides.{p}") for p, s in self.overrides.items()},
        )
