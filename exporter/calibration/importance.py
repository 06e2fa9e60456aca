"""How much each token of the calibration text counts in each layer.

An error at a layer's outputs costs what the loss's curvature there says, and the squared gradient
of the log-likelihood of tokens that the model itself draws estimates that (the Fisher information;
compare GuidedQuant, arXiv 2505.07004). Tokens differ a thousandfold: the first of a text, which
attention rests on, has by far the largest states in some layers and next to no gradient there.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exporter.model.decoder import FloatWeights, attend_causal, load_decoder
from exporter.progress import OnStep

#: A single draw is a rough estimate: no token counts more than this many average ones.
MOST = 10.0
_SEQUENCES_AT_ONCE, _POSITIONS_AT_ONCE = 2, 256


def token_weights(
    source: FloatWeights, tokens: Tensor, products: torch.dtype, seed: int, on_step: OnStep
) -> dict[str, Tensor]:
    """Of each linear layer but the output layer, by the name of its weight: what the tokens
    [sequences, seq] count, float32 [sequences * seq], about 1 on average."""
    decoder = load_decoder(source, tokens.shape[1])
    squares = dict[str, list[Tensor]]()

    def watch(name: str, layer: nn.Linear) -> None:
        def arrive(gradient: Tensor) -> None:
            squares.setdefault(name, []).append(gradient.float().square().mean(-1).flatten())

        layer.register_forward_hook(lambda _layer, _inputs, out: out.register_hook(arrive) and None)

    for name, part in decoder.model.layers.named_modules():
        if isinstance(part, nn.Linear):
            watch(f"model.layers.{name}.weight", part)
    # Gradients begin at the embedded tokens: the weights themselves need none.
    decoder.model.embed_tokens.register_forward_hook(lambda _layer, _in, out: out.requires_grad_())
    positions, draws = torch.arange(tokens.shape[1]), torch.Generator().manual_seed(seed)
    done = 0
    with torch.enable_grad(), torch.autocast("cpu", products, enabled=products != torch.float32):
        for batch in tokens.split(_SEQUENCES_AT_ONCE):
            states = decoder.hidden_states(batch, positions, attend_causal)
            states.backward(_surprise(states.detach(), decoder.lm_head.weight, draws))
            done += len(batch)
            on_step(done, len(tokens), "")
    found = {name: torch.cat(parts) for name, parts in squares.items()}
    least = torch.finfo(torch.float32).tiny  # where no output matters
    return {
        name: (one / one.mean().clamp(min=least)).clamp_(max=MOST) for name, one in found.items()
    }


@torch.no_grad()
def _surprise(states: Tensor, output: Tensor, draws: torch.Generator) -> Tensor:
    """The gradient of -log p by states [batch, seq, hidden], for one next token drawn at each."""
    gradient = torch.empty_like(states)
    for rows, into in zip(
        states.flatten(0, 1).split(_POSITIONS_AT_ONCE),
        gradient.flatten(0, 1).split(_POSITIONS_AT_ONCE),
        strict=True,
    ):
        p = F.linear(rows, output).float().softmax(-1)
        drawn = torch.multinomial(p, 1, generator=draws)
        slope = p.scatter_add_(-1, drawn, p.new_full(drawn.shape, -1.0))
        into.copy_(F.linear(slope, output.t()))
    return gradient
