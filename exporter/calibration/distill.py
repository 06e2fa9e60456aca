"""Distillation: train the quantized model to match the logits of the float checkpoint.

    mobilellm quantize mobilellm-r1-int4-distill --checkpoint DIR -o build/quantized

Weights and scales are trained together against the teacher's logits (compare LLM-QAT, arXiv
2305.17888). The step with the lowest KL on held-out text is kept, and the initial weights count as
step 0, so the result is never worse than them. The training state is saved at every evaluation; a
killed run resumes from it.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from exporter.calibration import parallel
from exporter.calibration.data import CalibrationText
from exporter.calibration.loss import compare, divergence
from exporter.calibration.settings import Calibration
from exporter.calibration.student import Student
from exporter.calibration.teacher import Teacher
from exporter.errors import InputError
from exporter.foreign import parse_json
from exporter.progress import OnStep
from exporter.quantization.schemes import QuantizedTensor, Scheme, pack_entries, unpack_entry
from exporter.tensors import open_own, write_tensors

STATE, BEST = "state.safetensors", "best.safetensors"


@dataclass(frozen=True)
class Evaluation:
    """Measured on the held-out text after `step` steps: mean KL in nats, and top-1 agreement with
    the teacher (0 to 1)."""

    step: int
    kl: float
    top1: float


@dataclass
class TrainingHistory:
    """The loss of each step and every evaluation of a distillation so far."""

    losses: list[float] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)

    @property
    def best(self) -> Evaluation:
        """The evaluation of lowest KL. Raises ValueError before the first evaluation."""
        return min(self.evaluations, key=lambda evaluation: evaluation.kl)

    @property
    def evaluations_since_best(self) -> int:
        """The number of evaluations since the one of lowest KL. The evaluation of step 0 is left
        out: during warm-up the KL may rise above it for a time."""
        trained = [evaluation.kl for evaluation in self.evaluations[1:]]
        return len(trained) - 1 - trained.index(min(trained)) if trained else 0


@dataclass(frozen=True)
class DistillationResult:
    """The quantized weights of the best step, and the training history."""

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
) -> DistillationResult:
    """Train the student, or resume from the training state in `folder`.

    Training ends after `calibration.steps` steps, or after `calibration.patience` evaluations
    without an improvement. Matrix products are of type `precision`. Raises InputError if the loss
    is not finite; the saved training state is kept.
    """
    run = _Trainer(student, teacher, calibration, text, folder, precision)
    history = run.resume()
    if not history.evaluations:
        run.evaluate(history)
    patience = calibration.patience
    while len(history.losses) < calibration.steps and history.evaluations_since_best < patience:
        step = len(history.losses)
        if step == 0 or step % calibration.evaluate_every == 0:
            on_step(step, calibration.steps, _note(history))
        history.losses.append(run.step(step))
        on_step(step + 1, calibration.steps, _note(history))
        if (step + 1) % calibration.evaluate_every == 0 or step + 1 == calibration.steps:
            run.evaluate(history)
    parallel.barrier()
    return DistillationResult(dict(_read_integers(folder / BEST, student.schemes())), history)


def _note(history: TrainingHistory) -> str:
    """The note of the progress bar: the mean loss of the last 10 steps and the best evaluation."""
    recent = history.losses[-10:]
    loss = f"loss {sum(recent) / len(recent):.4f}, " if recent else ""
    return f"{loss}held out KL {history.best.kl:.4f}, top-1 {history.best.top1:.1%}"


class _Trainer:
    """The training loop of one process."""

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
        self.trained = parallel.distributed_student(student, calibration.parallel)
        self.folder, self.precision = folder, precision
        self.global_batch_size = calibration.batch_size * parallel.world_size()
        batches = calibration.steps * calibration.accumulate
        self.tokens = text.train(batches * self.global_batch_size)
        self.held_out = text.held_out(calibration.held_out_sequences)
        self.rates, groups = list[float](), list[dict[str, list[Tensor]]]()
        learned = student.learned().values()
        for bits in sorted({weight.bits for weight in learned}):
            same_bits = [weight for weight in learned if weight.bits == bits]
            groups.append({"params": [weight.codes for weight in same_bits]})
            groups.append({"params": [weight.log_scales for weight in same_bits]})
            # int8 codes are 16 times finer than int4 codes, so their scales get 1/16 of the rate.
            factor = 2.0 ** (4 - bits)
            self.rates += [calibration.learning_rate, calibration.scale_learning_rate * factor]
        self.optimizer = torch.optim.AdamW(
            groups,
            betas=(0.9, 0.95), weight_decay=0.0, fused=calibration.parallel == "ddp",
        )  # fmt: skip

    def step(self, step: int) -> float:
        """Update the student once; returns the loss averaged over all processes.

        Raises InputError if the loss is not finite.
        """
        factor = _learning_rate_factor(self.calibration, step)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
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
                f"the loss is {loss_value} in step {step + 1}: training diverged",
                "Lower the learning rates, or set calibration.precision to float32",
            )
        self.optimizer.step()
        return loss_value

    def _batch(self, index: int) -> Tensor:
        """This process's part of a batch: [batch_size, sequence_length]."""
        first = index * self.global_batch_size + parallel.rank() * self.calibration.batch_size
        return self.tokens[first : first + self.calibration.batch_size]

    def _loss(self, tokens: Tensor) -> Tensor:
        calibration = self.calibration
        with self._autocast():
            if calibration.hidden_weight:
                target = self.teacher.states(tokens)
                logits = self.teacher.logits_of(target.flatten(0, 1))
            else:
                logits = self.teacher.logits(tokens)
            states, weight = self.trained(tokens)
            loss = divergence(states.flatten(0, 1), weight, logits, calibration.temperature)
            if calibration.hidden_weight:
                loss = loss + calibration.hidden_weight * F.mse_loss(states, target)
        return loss

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", self.precision, enabled=self.precision != torch.float32)

    @torch.no_grad()
    def evaluate(self, history: TrainingHistory) -> None:
        """Evaluate on the held-out text and save the training state. Raises InputError if the KL is
        not finite."""
        kl = top1 = 0.0
        with self._autocast():
            for tokens in self.held_out.split(self.calibration.batch_size):
                expected = self.teacher.states(tokens).flatten(0, 1)
                states, weight = self.student(tokens)
                batch_kl, batch_top1 = compare(
                    expected, self.teacher.output_weight, states.flatten(0, 1), weight
                )
                kl, top1 = kl + batch_kl, top1 + batch_top1
        count = self.held_out.numel()
        history.evaluations.append(Evaluation(len(history.losses), kl / count, top1 / count))
        if not math.isfinite(kl):
            raise InputError("the held-out text", f"has a KL of {kl}", "Lower the learning rates")
        self._save(history)

    def _save(self, history: TrainingHistory) -> None:
        """Write the best integers if they are new, then the training state with its history. Every
        process calls this; the first one writes."""
        state = parallel.training_state(self.student, self.optimizer)
        new_best = history.best is history.evaluations[-1]
        integers = self.student.quantized() if new_best else {}
        if parallel.rank():
            return
        if integers:
            write_tensors(self.folder / BEST, pack_entries(integers))
        step = str(len(history.losses))
        metadata = {"step": step, "history": json.dumps(asdict(history))}
        write_tensors(self.folder / STATE, state, metadata)

    def resume(self) -> TrainingHistory:
        """Restore the saved training state; an empty history if there is none."""
        path = self.folder / STATE
        if not path.is_file():
            return TrainingHistory()
        with open_own(path) as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dict
            history = (file.metadata() or {}).get("history", "")
        saved = parse_json(history.encode(), path, "Delete it, and run the same command again")
        parallel.restore(self.student, self.optimizer, state)
        evaluations = [Evaluation(**entry) for entry in saved["evaluations"]]
        return TrainingHistory(saved["losses"], evaluations)


def _learning_rate_factor(calibration: Calibration, step: int) -> float:
    """Linear warm-up times cosine decay to zero."""
    warm_up = min(1.0, (step + 1) / max(1, calibration.warm_up))
    return warm_up * 0.5 * (1 + math.cos(math.pi * step / calibration.steps))


def _read_integers(
    path: Path, schemes: Mapping[str, Scheme]
) -> Iterator[tuple[str, QuantizedTensor]]:
    with open_own(path) as file:
        for name, scheme in schemes.items():
            yield name, unpack_entry(name, scheme, file.get_tensor)
