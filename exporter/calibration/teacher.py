"""The teacher of a distillation: a float checkpoint, and the cache of its logits."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from exporter.calibration.cache import cache_lock
from exporter.calibration.data import hash_of
from exporter.calibration.loss import TeacherLogits, teacher_logits
from exporter.calibration.settings import Calibration
from exporter.errors import InputError
from exporter.files import sha256
from exporter.model.checkpoint import Checkpoint, open_checkpoint
from exporter.model.decoder import FloatWeights, attend_causal, load_decoder
from exporter.tensors import open_own, write_tensors


def open_teacher(calibration: Calibration, student: Checkpoint) -> Checkpoint:
    """Open the recipe's teacher, by default the student's own checkpoint.

    Raises InputError for a teacher with another vocabulary, tokenizer or hidden size, and for a
    `top_k` that is too large to cache the teacher's logits.
    """
    vocabulary = student.config.vocab_size
    if calibration.cache_teacher and calibration.top_k >= vocabulary:
        raise InputError(
            "calibration.cache_teacher",
            f"needs a top_k below the vocabulary size of {vocabulary}",
            "Set calibration.top_k to a few hundred",
        )
    if not calibration.teacher:
        return student
    teacher, subject = open_checkpoint(calibration.teacher), "calibration.teacher"
    config, own = teacher.config, student.config
    remedy = "Give a checkpoint of the same family"
    if config.vocab_size != own.vocab_size:
        raise InputError(
            subject, f"has {config.vocab_size} tokens, the checkpoint has {own.vocab_size}", remedy
        )
    files = [model.path / "tokenizer.json" for model in (teacher, student)]
    if all(file.is_file() for file in files) and len({sha256(file) for file in files}) > 1:
        raise InputError(subject, f"{files[0]} is not the checkpoint's tokenizer", remedy)
    if calibration.hidden_weight and config.hidden_size != own.hidden_size:
        reason = f"has hidden size {config.hidden_size}, the checkpoint has {own.hidden_size}"
        raise InputError(subject, reason, "Set calibration.hidden_weight to 0")
    teacher.check_weights()
    return teacher


class Teacher:
    """Computes the teacher's logits; `cache` is the folder of its cached logits, or None."""

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
    def logits_of(self, states: Tensor) -> TeacherLogits:
        """The logits of last hidden states [positions, hidden_size]."""
        logits = F.linear(states, self.output_weight)
        return teacher_logits(logits, self._calibration.top_k, self._calibration.temperature)

    def logits(self, tokens: Tensor) -> TeacherLogits:
        """The logits at all positions of `tokens` [batch, seq]: [batch * seq, top_k], or
        [batch * seq, vocab_size] with a `top_k` of 0. Read from the cache if there is one."""
        if self._cache is None:
            return self.logits_of(self.states(tokens).flatten(0, 1))
        cached = [self._cached(sequence, self._cache) for sequence in tokens]
        return TeacherLogits(
            torch.cat([ids for ids, _ in cached]), torch.cat([values for _, values in cached])
        )

    def _cached(self, sequence: Tensor, folder: Path) -> tuple[Tensor, Tensor]:
        path = folder / f"{hash_of(sequence.tolist())}.safetensors"
        if not path.is_file():
            with cache_lock(path):
                if not path.is_file():
                    self._write(sequence, path)
        with open_own(path) as file:
            return file.get_tensor("ids"), file.get_tensor("values")

    def _write(self, sequence: Tensor, path: Path) -> None:
        logits = self.logits_of(self.states(sequence[None])[0])
        assert logits.ids is not None
        write_tensors(path, {"ids": logits.ids, "values": logits.log_probabilities.float()})
