"""Run a float model again with some of its weights changed: only the layers from the first changed
one on are computed again."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call

from exporter.model.config import EMBEDDING
from exporter.model.decoder import Decoder, DecoderLayer, attend_causal


@dataclass(frozen=True)
class FloatRun:
    """A run over tokens [sequences, seq].

    `inputs` has the input of each layer and of the final norm, each [sequences, seq, hidden];
    `states` [sequences, seq, hidden] are those after the norm.
    """

    decoder: Decoder
    tokens: Tensor
    inputs: Sequence[Tensor]
    states: Tensor


@torch.inference_mode()
def run_float(decoder: Decoder, tokens: Tensor) -> FloatRun:
    """Run the model over tokens [sequences, seq]."""
    *inputs, states = _run(decoder, decoder.model.embed_tokens(tokens), 0, {})
    return FloatRun(decoder, tokens, inputs, states)


@torch.inference_mode()
def run_with(run: FloatRun, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Run the model with other values of the weights that `weights` names, which are those of the
    embedding, of layers, and of the output layer.

    Returns the states after the final norm [sequences, seq, hidden], and the weight of the output
    layer [vocab_size, hidden].
    """
    decoder = run.decoder
    output = weights.get(decoder.config.output_weight, decoder.lm_head.weight)
    first = first_changed_layer(decoder, weights)
    x = run.inputs[first]
    if EMBEDDING in weights:
        x = functional_call(decoder.model.embed_tokens, {"weight": weights[EMBEDDING]}, run.tokens)
    *_, states = _run(decoder, x, first, weights)
    return states, output


def first_changed_layer(decoder: Decoder, weights: Collection[str]) -> int:
    """The first layer that `run_with` computes again for weights of these names; the number of
    layers if only the output layer changes."""
    if EMBEDDING in weights:
        return 0
    layers = list(_layers(decoder))
    changed = (layer.index for layer in layers if any(n.startswith(layer.prefix) for n in weights))
    return next(changed, len(layers))


def _layers(decoder: Decoder) -> Iterator[DecoderLayer]:
    for layer in decoder.model.layers:
        assert isinstance(layer, DecoderLayer)
        yield layer


def _run(
    decoder: Decoder, x: Tensor, first: int, weights: Mapping[str, Tensor]
) -> Iterator[Tensor]:
    """Yield the input of each layer from `first` on and of the final norm, then its output."""
    cos, sin = (decoder.get_buffer(name)[: x.shape[1]] for name in ("cos", "sin"))
    for layer in list(_layers(decoder))[first:]:
        yield x
        own = {
            name.removeprefix(layer.prefix): weight
            for name, weight in weights.items()
            if name.startswith(layer.prefix)
        }
        x = functional_call(layer, own, (x, cos, sin, attend_causal))
    yield x
    yield decoder.model.norm(x)
