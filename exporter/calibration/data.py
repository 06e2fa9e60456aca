"""The calibration text: sources mixed by weight, with a part of each source held out.

The mixture depends on the seed alone, so a resumed run and every process of a distributed run see
the same text.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from exporter.calibration.settings import Calibration, Source
from exporter.errors import InputError
from exporter.files import sha256
from exporter.model.checkpoint import Checkpoint
from exporter.text.documents import read_documents
from exporter.text.sequences import cut_sequences
from exporter.text.tokenizer import load_tokenizer


@dataclass(frozen=True)
class SourceText:
    """The sequences of one source, each [sequence_length]; the last ones are held out."""

    name: str
    sha256: str
    weight: float
    train: Tensor
    held_out: Tensor


@dataclass(frozen=True)
class CalibrationText:
    """The text of all sources; each sequence is int64 [sequence_length]."""

    sources: tuple[SourceText, ...]
    seed: int

    def train(self, count: int) -> Tensor:
        """The first `count` training sequences of the mixture [count, sequence_length].

        Each source is shuffled, and shuffled again when all its sequences were used.
        """
        rng = random.Random(self.seed)
        total = sum(source.weight for source in self.sources)
        shares = [source.weight / total for source in self.sources]
        mixture, taken = list[Tensor](), [0] * len(self.sources)
        remaining: list[list[int]] = [[] for _ in self.sources]
        for position in range(1, count + 1):
            # The next sequence is of the source that is furthest below its share.
            deficits = [share * position - n for share, n in zip(shares, taken, strict=True)]
            index = deficits.index(max(deficits))
            source = self.sources[index]
            if not remaining[index]:
                remaining[index] = rng.sample(range(len(source.train)), len(source.train))
            mixture.append(source.train[remaining[index].pop()])
            taken[index] += 1
        return torch.stack(mixture)

    def held_out(self, count: int) -> Tensor:
        """Up to `count` held-out sequences [n, sequence_length], equally many of each source."""
        each = max(1, count // len(self.sources))
        return torch.cat([source.held_out[:each] for source in self.sources])

    def identity(self) -> list[dict[str, object]]:
        """Name, hash and weight of each source, for a manifest."""
        return [{"source": s.name, "sha256": s.sha256, "weight": s.weight} for s in self.sources]


def read_text(
    checkpoint: Checkpoint, calibration: Calibration, written: Sequence[Path]
) -> CalibrationText:
    """Every source, cut into sequences of tokens.

    `written` holds the files of the self-generated sources, in the order of the recipe. Raises
    InputError for a file that cannot be read or is too short.
    """
    files = iter(written)
    sources = [
        _read(checkpoint, calibration, source, next(files) if source.self_generated else None)
        for source in calibration.data
    ]
    return CalibrationText(tuple(sources), calibration.seed)


def check_sources(calibration: Calibration) -> None:
    """Check that every source file can be read. Raises InputError."""
    for source in calibration.data:
        if not source.self_generated:
            read_documents(Path(source.path), source.field or None)


def _read(
    checkpoint: Checkpoint, calibration: Calibration, source: Source, written: Path | None
) -> SourceText:
    path, length = written or Path(source.path), calibration.sequence_length
    tokenizer = load_tokenizer(checkpoint.path)
    documents = read_documents(path, None if written else source.field or None)
    texts = (tokenizer.document_text(document) for document in documents)
    begin, option = checkpoint.bos_token_id, "calibration.sequence_length"
    sequences = torch.tensor(cut_sequences(texts, tokenizer, begin, length, None, path, option))
    if sequences.max() >= checkpoint.config.vocab_size:
        raise InputError(
            checkpoint.path / "tokenizer.json",
            f"gives token {int(sequences.max())}, outside of the model's vocabulary",
            "The tokenizer does not belong to this model",
        )
    if len(sequences) < 2:
        raise InputError(
            path,
            f"gives one sequence of {length} tokens; at least one more is needed, to be held out",
            "Give more text, or lower calibration.sequence_length",
        )
    held_out = min(len(sequences) - 1, max(1, round(calibration.held_out * len(sequences))))
    name = "self-generated" if written else path.name
    return SourceText(
        name, sha256(path), source.weight, sequences[:-held_out], sequences[-held_out:]
    )


def hash_of(*parts: object) -> str:
    """The name of a cached result: 32 hex digits of the SHA-256 of the parts' `repr`."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
