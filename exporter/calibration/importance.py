"""Token weights for GPTQ, from the Fisher information of each layer's outputs.

The cost of an error at a layer's outputs is given by the curvature of the loss there. Its estimate
is the squared gradient of the log-likelihood of tokens sampled from the model (the Fisher
information; compare GuidedQuant, arXiv 2505.07004). Tokens differ by a factor of a thousand: the
first token of a text, an attention sink, has by far the largest states in some layers and almost
no gradient there.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exporter.model.decoder import FloatWeights, attend_causal, load_decoder
from exporter.progress import OnStep

#: Upper limit of a token's weight (the mean is 1), because one sample is a noisy estimate.
LARGEST_TOKEN_WEIGHT = 10.0
_SEQUENCES_AT_ONCE, _POSITIONS_AT_ONCE = 2, 256


def token_weights(
    source: FloatWeights, tokens: Tensor, products: torch.dtype, seed: int, on_step: OnStep
) -> dict[str, Tensor]:
    """The weights of `tokens` [sequences, seq] in each linear layer except the output layer.

    Name of the layer's weight → float32 [sequences * seq], with a mean of about 1.
    """
    decoder = load_decoder(source, tokens.shape[1])
    squares = dict[str, list[Tensor]]()

    def record(name: str, layer: nn.Linear) -> None:
        def on_gradient(gradient: Tensor) -> None:
            squares.setdefault(name, []).append(gradient.float().square().mean(-1).flatten())

        layer.register_forward_hook(
            lambda _layer, _inputs, out: out.register_hook(on_gradient) and None
        )

    for name, part in decoder.model.layers.named_modules():
        if isinstance(part, nn.Linear):
            record(f"model.layers.{name}.weight", part)
    # The weights need no gradient; the embedded tokens require one so that the graph is recorded.
    decoder.model.embed_tokens.register_forward_hook(lambda _layer, _in, out: out.requires_grad_())
    positions, draws = torch.arange(tokens.shape[1]), torch.Generator().manual_seed(seed)
    done = 0
    with torch.enable_grad(), torch.autocast("cpu", products, enabled=products != torch.float32):
        for batch in tokens.split(_SEQUENCES_AT_ONCE):
            states = decoder.hidden_states(batch, positions, attend_causal)
            states.backward(
                _log_likelihood_gradient(states.detach(), decoder.lm_head.weight, draws)
            )
            done += len(batch)
            on_step(done, len(tokens), "")
    fisher = {name: torch.cat(parts) for name, parts in squares.items()}
    smallest = torch.finfo(torch.float32).tiny  # avoids 0 / 0 where all gradients are zero
    return {
        name: (values / values.mean().clamp(min=smallest)).clamp_(max=LARGEST_TOKEN_WEIGHT)
        for name, values in fisher.items()
    }


@torch.no_grad()
def _log_likelihood_gradient(states: Tensor, output: Tensor, draws: torch.Generator) -> Tensor:
    """The gradient of -log p(token) with respect to `states` [batch, seq, hidden], for one next
    token sampled at each position."""
    gradient = torch.empty_like(states)
    for rows, into in zip(
        states.flatten(0, 1).split(_POSITIONS_AT_ONCE),
        gradient.flatten(0, 1).split(_POSITIONS_AT_ONCE),
        strict=True,
    ):
        p = F.linear(rows, output).float().softmax(-1)
        sampled = torch.multinomial(p, 1, generator=draws)
        to_logits = p.scatter_add_(-1, sampled, p.new_full(sampled.shape, -1.0))
        into.copy_(F.linear(to_logits, output.t()))
    return gradient
