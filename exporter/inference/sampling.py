"""Sample tokens from logits, with a temperature and top-p."""

import torch
from torch import Tensor


def sample(
    logits: Tensor, temperature: float, top_p: float, generator: torch.Generator
) -> list[int]:
    """Sample one token for each row of logits [rows, vocab_size], in the dtype of the logits.

    `top_p` keeps the most likely tokens, as few as have this total probability.
    """
    probabilities = (logits / temperature).softmax(-1)
    if top_p < 1:
        probabilities, order = probabilities.sort(dim=-1, descending=True)
        # A token is kept if the tokens before it have less than top_p: the first one always is.
        probabilities[probabilities.cumsum(-1) - probabilities >= top_p] = 0
        drawn = order.gather(-1, draw(probabilities, generator))
    else:
        drawn = draw(probabilities, generator)
    tokens: list[int] = drawn[:, 0].tolist()
    return tokens


def draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one index for each row of `probabilities` [rows, values]: [rows, 1].

    The rows need not sum to 1. Much faster than `torch.multinomial`.
    """
    below = probabilities.cumsum(-1, dtype=torch.float64)
    points = (
        torch.rand(len(probabilities), 1, generator=generator, dtype=torch.float64) * below[:, -1:]
    )
    return torch.searchsorted(below, points, right=True).clamp_(max=probabilities.shape[-1] - 1)
