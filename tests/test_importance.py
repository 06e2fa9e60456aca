"""The importance of tokens in a layer, against the Fisher information summed over all tokens."""

from typing import Any

import pytest
import torch
from calibrating import small_checkpoint
from conftest import LLAMA, LLAMA4, MakeCheckpoint
from torch import Tensor, nn

from exporter.calibration.gptq import gptq_weights
from exporter.calibration.importance import LARGEST_TOKEN_WEIGHT, token_weights
from exporter.model.decoder import FloatWeights, attend_causal, load_decoder
from exporter.quantization.schemes import FLOAT, Scheme

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
DOWN = {"llama4": "model.layers.1.feed_forward.down_proj", "llama": "model.layers.1.mlp.down_proj"}


def nothing(done: int, total: int, note: str) -> None:
    pass


def fisher(source: FloatWeights, layer: str, tokens: Tensor) -> Tensor:
    """The expected squared gradient of log p at a layer's outputs, for tokens [seq]."""
    decoder, kept = load_decoder(source, len(tokens)), list[Tensor]()
    part = decoder.get_submodule(layer)
    assert isinstance(part, nn.Linear)
    part.register_forward_hook(lambda _layer, _in, out: kept.append(out.requires_grad_()))
    decoder.model.embed_tokens.register_forward_hook(lambda _layer, _in, out: out.requires_grad_())
    states = decoder.hidden_states(tokens[None], torch.arange(len(tokens)), attend_causal)
    log_p = decoder.lm_head(states)[0].log_softmax(-1)
    total = torch.zeros(len(tokens))
    for position in log_p:
        for one in position:
            [slope] = torch.autograd.grad(one, kept[0], retain_graph=True)
            total += one.detach().exp() * slope[0].square().mean(-1)
    return total


@pytest.mark.parametrize("kind", ["llama4", "llama"])
def test_tokens_count_as_the_fisher_information_says(
    kind: str, make_checkpoint: MakeCheckpoint
) -> None:
    base: dict[str, Any] = {"llama4": LLAMA4, "llama": LLAMA}[kind]
    checkpoint = small_checkpoint(make_checkpoint, base)
    tokens = torch.randint(96, (6,), generator=torch.Generator().manual_seed(5))
    draws = 1500
    found = token_weights(checkpoint, tokens.expand(draws, -1), torch.float32, 0, nothing)
    for layer in (Q_PROJ.removesuffix(".weight"), DOWN[kind]):
        measured = found[f"{layer}.weight"].unflatten(0, (draws, 6)).mean(0)
        exact = fisher(checkpoint, layer, tokens)
        assert measured.tolist() == pytest.approx((exact / exact.mean()).tolist(), rel=0.2)


def test_every_linear_layer_is_weighed_and_no_token_counts_too_much(
    make_checkpoint: MakeCheckpoint,
) -> None:
    checkpoint = small_checkpoint(make_checkpoint)
    tokens = torch.randint(96, (5, 24), generator=torch.Generator().manual_seed(3))
    steps = list[int]()
    found = token_weights(
        checkpoint, tokens, torch.bfloat16, 1, lambda done, total, note: steps.append(done)
    )
    shapes = checkpoint.config.parameter_shapes()
    assert found.keys() == {n for n, shape in shapes.items() if "layers" in n and len(shape) == 2}
    for weights in found.values():
        assert weights.shape == (120,) and weights.dtype == torch.float32
        assert weights.min() >= 0 and weights.max() <= LARGEST_TOKEN_WEIGHT
    assert steps == [2, 4, 5]


def test_the_same_seed_draws_the_same_weights(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint, tokens = small_checkpoint(make_checkpoint), torch.arange(48).view(2, 24)
    one, same, other = (
        token_weights(checkpoint, tokens, torch.float32, seed, nothing)[Q_PROJ]
        for seed in (3, 3, 4)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_a_token_that_counts_nothing_might_as_well_not_be_there(
    make_checkpoint: MakeCheckpoint,
) -> None:
    checkpoint = small_checkpoint(make_checkpoint)
    schemes = dict.fromkeys(checkpoint.config.parameter_shapes(), FLOAT) | {Q_PROJ: Scheme(4, 32)}
    tokens = torch.randint(96, (2, 24), generator=torch.Generator().manual_seed(3))
    first_only = {Q_PROJ: torch.cat([torch.ones(24), torch.zeros(24)])}
    weighed, alone, both = (
        dict(gptq_weights(checkpoint, schemes, text, torch.float32, weights))[Q_PROJ].rounded
        for text, weights in ((tokens, first_only), (tokens[:1], {}), (tokens, {}))
    )
    assert torch.equal(weighed.codes, alone.codes) and torch.equal(weighed.scales, alone.scales)
    assert not torch.equal(weighed.codes, both.codes)
