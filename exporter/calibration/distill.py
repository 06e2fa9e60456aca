"""Distillation: the quantized model learns to say what the float checkpoint says.

    mobilellm quantize mobilellm-r1-int4-distill --checkpoint DIR -o build/quantized checkpoint

Weights and scales are trained together against the teacher's logits (compare LLM-QAT, arXiv
2305.17888). Text that nothing is learned from decides which step is kept, so that the result is
never worse than its start. What has been reached is on disk: a run that was killed goes on.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from exporter.calibration import parallel
from exporter.calibration.data import CalibrationText, OnStep
from exporter.calibration.loss import compare, divergence
from exporter.calibration.settings import Calibration
from exporter.calibration.student import Student
from exporter.calibration.teacher import Teacher
from exporter.errors import InputError
from exporter.files import write_tensors
from exporter.quantization.schemes import QuantizedTensor, Scheme

STATE, BEST = "state.safetensors", "best.safetensors"


@dataclass(frozen=True)
class Evaluation:
    """On the held-out text after `step` steps: mean KL in nats, and how often the most likely
    token is the teacher's."""

    step: int
    kl: float
    top1: float


@dataclass
class TrainingHistory:
    """What a distillation has done so far: the loss of each step, and every evaluation."""

    losses: list[float] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)

    @property
    def best(self) -> Evaluation:
        return min(self.evaluations, key=lambda evaluation: evaluation.kl)

    @property
    def stalled(self) -> int:
        """How many evaluations in a row were no better than one before. The start does not count:
        while rates are high, a student may be worse for a time."""
        trained = [evaluation.kl for evaluation in self.evaluations[1:]]
        return len(trained) - 1 - trained.index(min(trained)) if trained else 0


@dataclass(frozen=True)
class Distilled:
    """The best integers that were found, and how it went."""

    weights: Mapping[str, QuantizedTensor]
    history: TrainingHistory


def distill(
    student: Student,
    teacher: Teacher,
    calibration: Calibration,
    text: CalibrationText,
    folder: Path,
    precision: torch.dtype,
    on_step: OnStep,
) -> Distilled:
    """Train the student from where it stands, or from where a killed run left `folder`.

    Matrix products are of type `precision`. Raises InputError where the loss is no longer finite;
    what was reached stays on disk.
    """
    run = _Run(student, teacher, calibration, text, folder, precision)
    history = run.resume()
    if not history.evaluations:
        run.evaluate(history)
    while len(history.losses) < calibration.steps and history.stalled < calibration.patience:
        step = len(history.losses)
        if step == 0 or step % calibration.evaluate_every == 0:
            on_step(step, calibration.steps, _note(history))
        history.losses.append(run.step(step))
        on_step(step + 1, calibration.steps, _note(history))
        if (step + 1) % calibration.evaluate_every == 0 or step + 1 == calibration.steps:
            run.evaluate(history)
    parallel.wait_for_all()
    return Distilled(dict(_read_integers(folder / BEST, student.schemes())), history)


def _note(history: TrainingHistory) -> str:
    """What a progress bar shows: the loss of late, and the best of the held-out text."""
    late = history.losses[-10:]
    loss = f"loss {sum(late) / len(late):.4f}, " if late else ""
    return f"{loss}held out KL {history.best.kl:.4f}, top-1 {history.best.top1:.1%}"


class _Run:
    """One process of a distillation."""

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        calibration: Calibration,
        text: CalibrationText,
        folder: Path,
        precision: torch.dtype,
    ) -> None:
        self.student, self.teacher, self.calibration = student, teacher, calibration
        self.trained = parallel.spread(student, calibration.parallel)
        self.folder, self.precision = folder, precision
        self.each = calibration.batch_size * parallel.world_size()
        self.tokens = text.train(calibration.steps * calibration.accumulate * self.each)
        self.held_out = text.held_out(calibration.held_out_sequences)
        self.rates, groups = list[float](), list[dict[str, list[Tensor]]]()
        learned = student.learned().values()
        for bits in sorted({weight.bits for weight in learned}):
            alike = [weight for weight in learned if weight.bits == bits]
            groups.append({"params": [weight.codes for weight in alike]})
            groups.append({"params": [weight.log_scales for weight in alike]})
            # A change of scale that rounding to int4 swallows, int8 does not.
            finer = 2.0 ** (4 - bits)
            self.rates += [calibration.learning_rate, calibration.scale_learning_rate * finer]
        self.optimizer = torch.optim.AdamW(
            groups,
            betas=(0.9, 0.95), weight_decay=0.0, fused=calibration.parallel == "ddp",
        )  # fmt: skip

    def step(self, step: int) -> float:
        """One update of the student; its loss, the mean of all processes."""
        share = _share_of_rate(self.calibration, step)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * share
        self.optimizer.zero_grad(set_to_none=False)
        total = torch.zeros(())
        for part in range(self.calibration.accumulate):
            loss = self._loss(self._batch(step * self.calibration.accumulate + part))
            loss = loss / self.calibration.accumulate
            loss.backward()
            total += loss.detach()
        loss_value = float(parallel.mean(total))
        if not math.isfinite(loss_value):
            raise InputError(
                "calibration.learning_rate",
                f"the loss is {loss_value} in step {step + 1}: training has come apart",
                "Lower the learning rates, or set calibration.precision to float32",
            )
        self.optimizer.step()
        return loss_value

    def _batch(self, index: int) -> Tensor:
        """This process's part of a batch: [batch_size, sequence_length]."""
        first = index * self.each + parallel.rank() * self.calibration.batch_size
        return self.tokens[first : first + self.calibration.batch_size]

    def _loss(self, tokens: Tensor) -> Tensor:
        calibration = self.calibration
        with self._products():
            if calibration.hidden_weight:
                target = self.teacher.states(tokens)
                answers = self.teacher.answer(target.flatten(0, 1))
            else:
                answers = self.teacher.answers(tokens)
            states, weight = self.trained(tokens)
            loss = divergence(states.flatten(0, 1), weight, answers, calibration.temperature)
            if calibration.hidden_weight:
                loss = loss + calibration.hidden_weight * F.mse_loss(states, target)
        return loss

    def _products(self) -> torch.autocast:
        return torch.autocast("cpu", self.precision, enabled=self.precision != torch.float32)

    @torch.no_grad()
    def evaluate(self, history: TrainingHistory) -> None:
        """Measure the held-out text, and keep on disk what has been reached."""
        kl = top1 = 0.0
        with self._products():
            for tokens in self.held_out.split(self.calibration.batch_size):
                theirs = self.teacher.states(tokens).flatten(0, 1)
                states, weight = self.student(tokens)
                found = compare(theirs, self.teacher.output_weight, states.flatten(0, 1), weight)
                kl, top1 = kl + found[0], top1 + found[1]
        count = self.held_out.numel()
        history.evaluations.append(Evaluation(len(history.losses), kl / count, top1 / count))
        if not math.isfinite(kl):
            raise InputError("the held-out text", f"has a KL of {kl}", "Lower the learning rates")
        self._save(history)

    def _save(self, history: TrainingHistory) -> None:
        """The best integers, then the state that goes with the history, which names the step."""
        state = parallel.training_state(self.student, self.optimizer)
        new_best = history.best is history.evaluations[-1]
        integers = self.student.quantized() if new_best else {}
        if parallel.rank():
            return
        if integers:
            entries = dict[str, Tensor]()
            for name, stored in integers.items():
                entries |= {f"{name}.codes": stored.codes, f"{name}.scales": stored.scales}
            write_tensors(self.folder / BEST, entries)
        step = str(len(history.losses))
        metadata = {"step": step, "history": json.dumps(asdict(history))}
        write_tensors(self.folder / STATE, state, metadata)

    def resume(self) -> TrainingHistory:
        """What a killed run left, or an empty history."""
        path = self.folder / STATE
        if not path.is_file():
            return TrainingHistory()
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dict
            saved: dict[str, Any] = json.loads(file.metadata()["history"])
        parallel.restore(self.student, self.optimizer, state)
        evaluations = [Evaluation(**entry) for entry in saved["evaluations"]]
        return TrainingHistory(saved["losses"], evaluations)


def _share_of_rate(calibration: Calibration, step: int) -> float:
    """Warm-up, then half a cosine down to zero."""
    warm_up = min(1.0, (step + 1) / max(1, calibration.warm_up))
    return warm_up * 0.5 * (1 + math.cos(math.pi * step / calibration.steps))


def _read_integers(
    path: Path, schemes: Mapping[str, Scheme]
) -> Iterator[tuple[str, QuantizedTensor]]:
    with safe_open(path, framework="pt") as file:
        for name, scheme in schemes.items():
            codes, scales = file.get_tensor(f"{name}.codes"), file.get_tensor(f"{name}.scales")
            yield name, QuantizedTensor(codes, scales, scheme)
