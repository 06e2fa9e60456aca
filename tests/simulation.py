"""Greedy tokens of a runtime that rounds activations, held to a simulation of that rounding.

Greedy decoding continues whatever was chosen, so one near tie makes the rest of two texts differ.
Each choice is therefore judged by itself: the models in torch read the tokens that were chosen.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from exporter.backends import Runner
from exporter.evaluation.agreement import compare_logits
from exporter.inference.reference import ReferenceRunner
from exporter.quantization.activations import Rounding
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint


def greedy(runner: Runner, prompt: list[int], steps: int) -> tuple[list[int], Tensor]:
    """The likeliest tokens after a prompt, and the logits [steps, vocab_size] that each was chosen
    from."""
    rows = [runner.prefill(prompt)]
    chosen = [int(rows[0].argmax())]
    for _ in range(steps - 1):
        rows.append(runner.decode(chosen[-1]))
        chosen.append(int(rows[-1].argmax()))
    return chosen, torch.stack(rows)


def forced(runner: Runner, prompt: list[int], chosen: Sequence[int]) -> Tensor:
    """The logits [steps, vocab_size] that a runner has where each of these tokens was chosen."""
    return torch.stack([runner.prefill(prompt), *(runner.decode(token) for token in chosen[:-1])])


@dataclass
class Simulation:
    """A quantized checkpoint in torch, with and without the rounding of a runtime.

    `total` counts the tokens that were judged, `same` those that the simulation chooses too.
    """

    quantized: QuantizedCheckpoint
    rounding: Rounding | None
    context: int
    total: int = 0
    same: int = 0

    def __post_init__(self) -> None:
        self._simulated = ReferenceRunner(self.quantized, self.context, self.rounding)
        self._exact = ReferenceRunner(self.quantized, self.context)

    def unexplained(
        self, prompt: list[int], chosen: Sequence[int], logits: Tensor | None = None
    ) -> list[str]:
        """What the rounding does not explain in the tokens that a runtime chose after a prompt.

        A token may be another than the simulation's if its logit is lower by no more than the error
        of the simulation. If `logits` [steps, vocab_size] are given, their divergence from those
        without rounding may be twice that of the simulation.
        """
        simulated = forced(self._simulated, prompt, chosen)
        reference = forced(self._exact, prompt, chosen)
        error, found = float((simulated - reference).abs().max()), list[str]()
        for step, token in enumerate(chosen):
            gap = float(simulated[step].max() - simulated[step, token])
            self.total, self.same = self.total + 1, self.same + (gap == 0)
            if gap > error:
                found.append(f"token {step} has a gap of {gap:.3g}, not {error:.3g}")
        if logits is not None:
            divergence = compare_logits(reference, logits).kl
            allowed = 1e-4 + 2 * compare_logits(reference, simulated).kl
            if divergence > allowed:
                found.append(f"KL {divergence:.2g} is above {allowed:.2g}")
        return found
