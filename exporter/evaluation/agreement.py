"""Compare the logits of two models."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Agreement:
    """The result of `compare_logits`. `worst` is the index of the position with the largest KL."""

    positions: int
    kl: float
    top1: float
    max_difference: float
    worst: int


def log_probabilities(logits: Tensor) -> Tensor:
    """Log-softmax of float32 logits [..., vocab_size] in float64.

    KL is a small difference of large sums, for which float32 is too coarse.
    """
    return logits.double().log_softmax(-1)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats [positions], of log-probabilities [positions, vocab_size]."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def same_choice(reference: Tensor, logits: Tensor) -> Tensor:
    """Whether both choose the same most likely token: bool [positions]."""
    return reference.argmax(-1) == logits.argmax(-1)


def compare_logits(reference: Tensor, logits: Tensor) -> Agreement:
    """Compare float32 logits [positions, vocab_size].

    `kl` is the mean of KL(reference || logits) in nats, `top1` the share of positions with the
    same most likely token, `max_difference` the largest absolute difference of any logit.
    A NaN in `logits` makes the figures NaN, which no limit accepts.
    """
    kl = divergence(log_probabilities(reference), log_probabilities(logits))
    return Agreement(
        positions=len(kl),
        kl=kl.mean().item(),
        top1=same_choice(reference, logits).double().mean().item(),
        max_difference=(reference - logits).abs().max().item(),
        worst=int(kl.nan_to_num(nan=float("inf")).argmax()),
    )
