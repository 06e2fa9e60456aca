"""Perplexity of a model on a text, and KL and agreement with the predictions of another model.

    mobilellm evaluate build/nano --data problems.jsonl --reference examples/mobilellm-r1-nano

Every kind of model reads the same sequences, those of `exporter.text.sequences`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from exporter.backends import Runner
from exporter.errors import InputError
from exporter.evaluation.agreement import divergence, log_probabilities, same_choice
from exporter.inference.reference import ReferenceRunner
from exporter.progress import OnStep

#: Logits of this many positions are in memory at once; a vocabulary of 128k takes 0.5 MB each.
ROWS = 64


@dataclass(frozen=True)
class Band:
    """The figures of positions `first`..`last` of every sequence, from 0.

    A prediction belongs to the position of the last token that was read for it.
    """

    first: int
    last: int
    perplexity: float
    kl: float | None
    top1_agreement: float | None


@dataclass(frozen=True)
class TextScore:
    """The figures of a model over all `tokens` that it predicted.

    `kl` is the mean of KL(reference || model) in nats, and `top1_agreement` the share of positions
    with the same most likely token; both are None without a reference. `perplexity_error` and
    `kl_error` are standard errors, which treat the tokens as independent; that of an agreement a is
    sqrt(a (1 - a) / tokens). Two models on the same text make most of their errors together, so the
    difference of their figures varies less than these errors say.
    """

    tokens: int
    sequences: int
    perplexity: float
    perplexity_error: float
    reference_perplexity: float | None
    kl: float | None
    kl_error: float | None
    top1_agreement: float | None
    agreement_by_position: tuple[Band, ...]


def score_text(
    runner: Runner,
    sequences: Sequence[Sequence[int]],
    on_step: OnStep,
    reference: Runner | None = None,
    prefill: int = 1,
) -> TextScore:
    """Score the prediction of each token of the sequences from the tokens before it.

    A model in torch reads a whole sequence at once. An artifact reads its first `prefill` tokens
    at once and the others one by one. For both, the first scored prediction is that after the
    first `prefill` tokens. Raises InputError where logits are not finite.
    """
    found = list[Tensor]()
    mean = 0.0
    for index, tokens in enumerate(sequences):
        on_step(index, len(sequences), f"perplexity {_exp(mean):.2f}" if index else "")
        found.append(torch.cat(list(_scored(runner, reference, tokens, prefill)), -1))
        for name, losses in zip(("model", "reference"), found[-1][:2], strict=True):
            bad = (~losses.isfinite()).nonzero()
            if len(bad) and (reference is not None or name == "model"):
                raise InputError(
                    f"sequence {index}",
                    f"the {name}'s logits at position {prefill - 1 + int(bad[0])} are not finite",
                    "mobilellm verify shows where a lowered model goes wrong",
                )
        mean += (found[-1][0].mean().item() - mean) / (index + 1)
    on_step(len(sequences), len(sequences), f"perplexity {_exp(mean):.2f}")
    loss, reference_loss, kl, same = torch.stack(found, 1)
    perplexity = _exp(loss.mean().item())
    return TextScore(
        tokens=loss.numel(),
        sequences=len(sequences),
        perplexity=perplexity,
        perplexity_error=perplexity * _standard_error(loss),
        reference_perplexity=_exp(reference_loss.mean().item()) if reference else None,
        kl=kl.mean().item() if reference else None,
        kl_error=_standard_error(kl) if reference else None,
        top1_agreement=same.mean().item() if reference else None,
        agreement_by_position=tuple(
            Band(
                first=first + prefill - 1,
                last=last + prefill - 2,
                perplexity=_exp(loss[:, first:last].mean().item()),
                kl=kl[:, first:last].mean().item() if reference else None,
                top1_agreement=same[:, first:last].mean().item() if reference else None,
            )
            for first, last in bands(loss.shape[1])
        ),
    )


def bands(count: int) -> list[tuple[int, int]]:
    """Positions 0..count - 1 as half-open ranges: 16 positions, then each as many as all before."""
    edges = [0, *(16 << power for power in range(32) if 16 << power < count), count]
    return list(pairwise(edges))


def next_logits(
    runner: Runner, tokens: Sequence[int], prefill: int, rows: int = ROWS
) -> Iterator[Tensor]:
    """The logits after the first `prefill` tokens and after each further token.

    Each item is float32 [up to `rows`, vocab_size].
    """
    if isinstance(runner, ReferenceRunner):
        yield from runner.score(tokens, prefill - 1, rows)
        return
    found = [runner.prefill(list(tokens[:prefill]))]
    for token in tokens[prefill:]:
        if len(found) == rows:
            yield torch.stack(found)
            found = []
        found.append(runner.decode(token))
    yield torch.stack(found)


def _scored(
    runner: Runner, reference: Runner | None, tokens: Sequence[int], prefill: int
) -> Iterator[Tensor]:
    """Figures of up to `ROWS` positions at a time, float64 [4, positions]: the model's loss, the
    reference's loss, KL, and 1 where both choose the same token. NaN without a reference."""
    read, targets = tokens[:-1], torch.tensor(tokens[prefill:]).split(ROWS)
    logits = next_logits(runner, read, prefill)
    if reference is None:
        for rows, wanted in zip(logits, targets, strict=True):
            loss = _loss(log_probabilities(rows), wanted)
            yield torch.stack((loss, *[torch.full_like(loss, math.nan)] * 3))
        return
    theirs = next_logits(reference, read, prefill)
    for rows, expected, wanted in zip(logits, theirs, targets, strict=True):
        log_p, log_q = log_probabilities(expected), log_probabilities(rows)
        kl, same = divergence(log_p, log_q), same_choice(expected, rows).double()
        yield torch.stack((_loss(log_q, wanted), _loss(log_p, wanted), kl, same))


def _loss(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    """The negative log-likelihood of each target in nats: [positions]."""
    return -log_probabilities.gather(-1, targets[:, None])[:, 0]


def _standard_error(values: Tensor) -> float:
    """The standard error of the mean of independent values."""
    return values.std(correction=0).item() / math.sqrt(values.numel())


def _exp(loss: float) -> float:
    """exp(loss), infinite where math.exp would overflow."""
    return math.exp(loss) if loss < 700 else math.inf
