"""KL by layer: how much the quantized weights of each layer alone change the predictions.

    mobilellm evaluate build/nano/quantized --data FILE --reference CHECKPOINT --layers

For each layer, the float model runs with the quantized weights of this layer and its own weights
everywhere else, in torch. The work grows with the square of the number of layers.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from exporter.errors import InputError
from exporter.evaluation.agreement import divergence, log_probabilities
from exporter.evaluation.perplexity import ROWS
from exporter.model.changed_weights import first_changed_layer, run_float, run_with
from exporter.model.config import EMBEDDING, OUTPUT, ModelConfig
from exporter.model.decoder import Decoder
from exporter.progress import OnStep
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint
from exporter.quantization.schemes import FLOAT

#: Positions of one batch. The states of each layer are kept for them, twice:
#: 0.5 GB for 32 layers of 2048 hidden values.
_POSITIONS = 1024
#: The part of the work, beside the layers, that multiplies states with the output layer.
_OUTPUTS = "logits"


@dataclass(frozen=True)
class LayerKL:
    """The mean of KL(float || float with this layer quantized) in nats.

    `layer` is such as ``model.layers.0``, ``model.embed_tokens`` or ``lm_head``. A tied embedding
    is one layer, quantized at both ends. A layer without a quantized weight has 0.
    """

    layer: str
    kl: float


def quantized_weights(config: ModelConfig, quantized: QuantizedCheckpoint) -> dict[str, list[str]]:
    """The names of the quantized weights of each layer, in the order of the model."""
    layers = {EMBEDDING.removesuffix(".weight"): [EMBEDDING]}
    for index in range(config.num_hidden_layers):
        layers[f"model.layers.{index}"] = list(config.layer_shapes(index))
    if not config.tie_word_embeddings:
        layers[OUTPUT.removesuffix(".weight")] = [OUTPUT]
    return {
        layer: [name for name in names if quantized.schemes[name] != FLOAT]
        for layer, names in layers.items()
    }


@torch.inference_mode()
def kl_by_layer(
    decoder: Decoder,
    quantized: QuantizedCheckpoint,
    sequences: Sequence[Sequence[int]],
    on_step: OnStep,
    prefill: int = 1,
) -> list[LayerKL]:
    """The KL of each layer over the predictions that `score_text` scores.

    `decoder` is the float model that was quantized. Raises InputError where the logits of a changed
    model are not finite.
    """
    layers = quantized_weights(decoder.config, quantized)
    changed = {layer: names for layer, names in layers.items() if names}
    totals = dict.fromkeys(layers, 0.0)
    length = len(sequences[0]) - 1
    size = max(1, _POSITIONS // length)
    step = _counter(decoder, changed, -(-len(sequences) // size), on_step)
    for start in range(0, len(sequences), size):
        run = run_float(
            decoder, torch.tensor([list(one[:-1]) for one in sequences[start : start + size]])
        )
        models = [(run.states, decoder.lm_head.weight)]
        for layer, names in changed.items():
            models.append(run_with(run, {name: quantized.float_weight(name) for name in names}))
            step(layer)
        found = _total_kl([(states[:, prefill - 1 :], output) for states, output in models])
        step(_OUTPUTS)
        for layer, kl in zip(changed, found, strict=True):
            if not math.isfinite(kl):
                raise InputError(
                    layer,
                    "gives logits that are not finite when it alone is quantized",
                    "mobilellm verify shows weights that are damaged",
                )
            totals[layer] += kl
    predictions = len(sequences) * (length - prefill + 1)
    return [LayerKL(layer, kl / predictions) for layer, kl in totals.items()]


def _counter(
    decoder: Decoder, changed: Mapping[str, Sequence[str]], batches: int, on_step: OnStep
) -> Callable[[str], None]:
    """Counts work in runs of one layer, for a fair estimate of the time. It is called with each
    layer of each batch, then with `_OUTPUTS`."""
    count = len(decoder.model.layers)
    layer_parameters = sum(weight.numel() for weight in decoder.model.layers.parameters()) / count
    work: dict[str, float] = {
        layer: count - first_changed_layer(decoder, names) for layer, names in changed.items()
    }
    work[_OUTPUTS] = (len(changed) + 1) * decoder.lm_head.weight.numel() / layer_parameters
    total, done = batches * sum(work.values()), 0.0
    on_step(0, math.ceil(total), "")

    def step(part: str) -> None:
        nonlocal done
        done += work[part]
        on_step(round(done), math.ceil(total), part)

    return step


def _total_kl(models: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
    """The sum over all positions of the KL from the first model to each other one.

    A model is its states [sequences, seq, hidden] and the weight of its output layer.
    """
    (states, output), *others = [(states.flatten(0, 1), weight) for states, weight in models]
    totals = torch.zeros(len(others), dtype=torch.float64)
    for start in range(0, len(states), ROWS):
        rows = slice(start, start + ROWS)
        log_p = log_probabilities(F.linear(states[rows], output))
        for index, (other, weight) in enumerate(others):
            log_q = log_probabilities(F.linear(other[rows], weight))
            totals[index] += divergence(log_p, log_q).sum()
    found: list[float] = totals.tolist()
    return found
