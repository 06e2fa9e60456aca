"""The distillation loss, KL(teacher || student) at a temperature, and its gradient.

The teacher's distribution may be given by its `top_k` most likely tokens; then all other tokens
are one bucket in both distributions.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_POSITIONS_AT_ONCE = 256
_SMALLEST = 1e-9


@dataclass(frozen=True)
class TeacherLogits:
    """The teacher's distributions: int32 token ids and log-probabilities at the temperature, each
    [positions, top_k]; if `ids` is None, log-probabilities of all tokens [positions, vocab_size].
    """

    ids: Tensor | None
    log_probabilities: Tensor


def teacher_logits(logits: Tensor, top_k: int, temperature: float) -> TeacherLogits:
    """The `top_k` most likely tokens of logits [positions, vocab_size]; 0 keeps all tokens."""
    log_p = (logits.float() / temperature).log_softmax(-1)
    if not top_k or top_k >= logits.shape[-1]:
        return TeacherLogits(None, log_p)
    values, ids = log_p.topk(top_k)
    return TeacherLogits(ids.to(torch.int32), values)


class _Divergence(torch.autograd.Function):
    """Output layer and loss in one operation. It works on blocks of positions and computes the
    gradient in the forward pass, so the logits of a batch are never all in memory."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, teacher: TeacherLogits, temperature: float
    ) -> Tensor:
        low = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
        narrow, total = weight.to(low), torch.zeros(())
        to_states = torch.empty_like(states)
        to_weight = torch.zeros_like(weight)
        with torch.autocast("cpu", enabled=False):
            for start in range(0, len(states), _POSITIONS_AT_ONCE):
                rows = slice(start, start + _POSITIONS_AT_ONCE)
                block = states[rows].to(low)
                logits = F.linear(block, narrow).float().div_(temperature)
                ids = None if teacher.ids is None else teacher.ids[rows].long()
                log_p = teacher.log_probabilities[rows].float()
                loss, to_logits = _divergence_and_gradient(logits, ids, log_p)
                total += loss
                # The loss has the factor temperature²; the division of the logits takes one.
                to_logits = to_logits.mul_(temperature / len(states)).to(low)
                to_states[rows] = to_logits @ narrow
                to_weight += to_logits.t() @ block
        ctx.save_for_backward(to_states, to_weight)
        return total * (temperature**2 / len(states))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        to_states, to_weight = ctx.saved_tensors
        return to_states * gradient, to_weight * gradient, None, None


def _divergence_and_gradient(
    logits: Tensor, ids: Tensor | None, log_p: Tensor
) -> tuple[Tensor, Tensor]:
    """The sum of KL over positions, and its gradient with respect to `logits`, which it
    overwrites."""
    log_q = logits.log_softmax(-1)
    chosen = log_q if ids is None else log_q.gather(-1, ids)
    p = log_p.exp()
    loss = (p * (log_p - chosen)).sum()
    q = torch.exp(log_q, out=logits)
    if ids is None:
        return loss, q.sub_(p)
    p_rest = (1 - p.sum(-1, keepdim=True)).clamp_(min=_SMALLEST)
    q_rest = (1 - chosen.exp().sum(-1, keepdim=True)).clamp_(min=_SMALLEST)
    loss += (p_rest * (p_rest.log() - q_rest.log())).sum()
    gradient = q.mul_(1 - p_rest / q_rest)
    return loss, gradient.scatter_(-1, ids, chosen.exp() - p)


def divergence(
    states: Tensor, weight: Tensor, teacher: TeacherLogits, temperature: float = 1.0
) -> Tensor:
    """The mean KL in nats, times temperature², from `teacher` to the student's logits.

    The logits are those of `states` [positions, hidden] and the output layer's `weight`
    [vocab_size, hidden].
    """
    loss: Tensor = _Divergence.apply(  # type: ignore[no-untyped-call]  # of torch
        states, weight, teacher, temperature
    )
    return loss


@torch.no_grad()
def compare(
    teacher: Tensor, teacher_weight: Tensor, student: Tensor, student_weight: Tensor
) -> tuple[float, float]:
    """The sum of KL in nats over positions, and the number of positions with the same most likely
    token.

    `teacher` and `student` are hidden states [positions, hidden]; the weights are those of the
    output layers [vocab_size, hidden].
    """
    kl = same = 0.0
    for start in range(0, len(teacher), _POSITIONS_AT_ONCE):
        rows = slice(start, start + _POSITIONS_AT_ONCE)
        log_p = F.linear(teacher[rows], teacher_weight).float().log_softmax(-1)
        log_q = F.linear(student[rows], student_weight).float().log_softmax(-1)
        same += (log_p.argmax(-1) == log_q.argmax(-1)).sum().item()
        kl += (log_p.exp() * (log_p - log_q)).sum().item()
    return kl, same
