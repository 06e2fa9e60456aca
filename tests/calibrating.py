"""A small checkpoint with a tokenizer, and a calibration of it that takes a second."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from conftest import LLAMA4, MakeCheckpoint, random_weights
from tokenizers import Tokenizer, decoders, models
from torch import Tensor

from exporter.model.checkpoint import Checkpoint, open_checkpoint
from exporter.model.config import ModelConfig
from exporter.model.decoder import FloatWeights
from exporter.pipeline import no_progress, quantize
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint
from exporter.recipe import Recipe, parse_recipe

BEGIN, END = "<begin>", "<end>"
CHARACTERS = "\n" + "".join(map(chr, range(32, 123)))
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def small_checkpoint(
    make: MakeCheckpoint, base: Mapping[str, Any] = LLAMA4, name: str = "model", **changes: Any
) -> Checkpoint:
    """A checkpoint of 96 tokens, characters all but four, that is surer of the next one than
    random weights are."""
    config = {**base, **changes}
    weights = {
        key: 4 * weight if weight.dim() == 2 else weight
        for key, weight in random_weights(config, torch.bfloat16).items()
    }
    folder = make(config, name=name, weights=weights)
    write_tokenizer(folder)
    return open_checkpoint(folder)


def write_tokenizer(folder: Path, characters: str = CHARACTERS) -> None:
    names = [BEGIN, END, "<turn>", "<unknown>", *characters]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unknown>"))
    tokenizer.add_special_tokens(names[:4])
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = {"bos_token": BEGIN, "eos_token": END, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))


def recipe_of(method: str, data: Path | list[dict[str, Any]], **settings: Any) -> Recipe:
    """A recipe of small numbers; `settings` are of calibration, and the `budget`."""
    sources = [{"path": str(data)}] if isinstance(data, Path) else data
    budget = settings.pop("budget", "")
    small = {
        "sequence_length": 32, "gptq_sequences": 4, "sensitivity_sequences": 1, "steps": 6,
        "evaluate_every": 2, "held_out_sequences": 4, "warm_up": 2, "precision": "float32",
    }  # fmt: skip
    raw = {
        "name": "small",
        "quantization": {"method": method, "budget": budget},
        "calibration": {**small, "data": sources, **settings},
    }
    return parse_recipe(raw, "small.yaml")


def quantize_here(recipe: Recipe, checkpoint: Checkpoint, out: Path) -> QuantizedCheckpoint:
    quantized = quantize(recipe, checkpoint, out, no_progress)
    assert quantized is not None
    return quantized


def journal_of(quantized: QuantizedCheckpoint) -> dict[str, Any]:
    content = json.loads((quantized.path / "calibration" / "distillation.json").read_text())
    assert isinstance(content, dict)
    return content


@dataclass(frozen=True)
class Replaced:
    """The weights of `source`, some of them others."""

    source: FloatWeights
    others: Mapping[str, Tensor]

    @property
    def config(self) -> ModelConfig:
        return self.source.config

    def float_weight(self, name: str) -> Tensor:
        return self.others[name] if name in self.others else self.source.float_weight(name)


def divergence_of(source: FloatWeights, other: FloatWeights, tokens: Tensor) -> float:
    """Mean KL in nats over all positions of tokens [sequences, seq], computed by whole models."""
    from exporter.model.decoder import load_decoder

    with torch.inference_mode():
        log_p, log_q = (
            load_decoder(one, tokens.shape[1]).score(tokens).log_softmax(-1)
            for one in (source, other)
        )
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
