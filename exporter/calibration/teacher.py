"""The float checkpoint as a teacher, and its answers on disk where that is asked for."""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from exporter.calibration.cache import cache_lock
from exporter.calibration.data import hash_of
from exporter.calibration.loss import TeacherLogits, teacher_logits
from exporter.calibration.settings import Calibration
from exporter.errors import InputError
from exporter.files import sha256, write_tensors
from exporter.model.checkpoint import Checkpoint, open_checkpoint
from exporter.model.decoder import FloatWeights, attend_causal, load_decoder


def open_teacher(calibration: Calibration, student: Checkpoint) -> Checkpoint:
    """The recipe's teacher; raises InputError for one that says other tokens than the student, or
    whose answers would be too many to keep."""
    vocabulary = student.config.vocab_size
    if calibration.cache_teacher and calibration.top_k >= vocabulary:
        raise InputError(
            "calibration.cache_teacher",
            f"needs a top_k below the {vocabulary} tokens that there are",
            "Set calibration.top_k to some hundred",
        )
    if not calibration.teacher:
        return student
    teacher, subject = open_checkpoint(calibration.teacher), "calibration.teacher"
    theirs, ours = teacher.config, student.config
    remedy = "Give a checkpoint of the same family"
    if theirs.vocab_size != ours.vocab_size:
        raise InputError(
            subject, f"knows {theirs.vocab_size} tokens, the checkpoint {ours.vocab_size}", remedy
        )
    files = [model.path / "tokenizer.json" for model in (teacher, student)]
    if all(file.is_file() for file in files) and len({sha256(file) for file in files}) > 1:
        raise InputError(subject, f"{files[0]} is not the checkpoint's tokenizer", remedy)
    if calibration.hidden_weight and theirs.hidden_size != ours.hidden_size:
        reason = f"has hidden states of {theirs.hidden_size}, the checkpoint of {ours.hidden_size}"
        raise InputError(subject, reason, "Set calibration.hidden_weight to 0")
    teacher.check_weights()
    return teacher


class Teacher:
    """Answers for sequences of tokens; `cache` is a folder for them, named for this teacher."""

    def __init__(
        self, source: FloatWeights, calibration: Calibration, cache: Path | None = None
    ) -> None:
        self._decoder = load_decoder(source, calibration.sequence_length)
        self.output_weight: Tensor = self._decoder.lm_head.weight
        self._calibration, self._cache = calibration, cache

    @torch.no_grad()
    def states(self, tokens: Tensor) -> Tensor:
        """Last hidden states [batch, seq, hidden_size]."""
        positions = torch.arange(tokens.shape[1])
        return self._decoder.hidden_states(tokens, positions, attend_causal)

    @torch.no_grad()
    def answer(self, states: Tensor) -> TeacherLogits:
        """What it says at these states [positions, hidden_size]."""
        logits = F.linear(states, self.output_weight)
        return teacher_logits(logits, self._calibration.top_k, self._calibration.temperature)

    def answers(self, tokens: Tensor) -> TeacherLogits:
        """For tokens [batch, seq]: one after the other, [batch * seq, top_k]."""
        if self._cache is None:
            return self.answer(self.states(tokens).flatten(0, 1))
        found = [self._cached(sequence, self._cache) for sequence in tokens]
        return TeacherLogits(
            torch.cat([ids for ids, _ in found]), torch.cat([values for _, values in found])
        )

    def _cached(self, sequence: Tensor, folder: Path) -> tuple[Tensor, Tensor]:
        path = folder / f"{hash_of(sequence.tolist())}.safetensors"
        if not path.is_file():
            with cache_lock(path):
                if not path.is_file():
                    self._keep(sequence, path)
        with safe_open(path, framework="pt") as file:
            return file.get_tensor("ids"), file.get_tensor("values")

    def _keep(self, sequence: Tensor, path: Path) -> None:
        answer = self.answer(self.states(sequence[None])[0])
        assert answer.ids is not None
        write_tensors(path, {"ids": answer.ids, "values": answer.log_probabilities.float()})
