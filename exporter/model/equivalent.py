"""The same model as a family that other engines know: other names, rows in another order.

MobileLLM-R1 (`llama4_text`) is a Qwen3 whose norms of queries and keys have a weight of ones:

- It computes norm(rope(q)), Qwen3 computes rope(norm(q) * w). A rotation does not change the norm
  of a head, so for w = 1 the two are equal.
- Its RoPE rotates adjacent numbers of a head, Qwen3's the two halves of a head. The rows of each
  head of `q_proj` and `k_proj` in another order turn one into the other; scores q·k do not change
  if q and k are permuted alike.

A row has its own codes and scales, so they move with it, and no integer changes.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from exporter.model.config import ModelConfig


@dataclass(frozen=True)
class Source:
    """Where a weight of the equivalent model is found: `name` in the model itself, or None for a
    norm weight of ones. Row i is row `rows[i]` of it; with `rows` None the order is the same."""

    name: str | None
    rows: Tensor | None = None

    def reorder(self, values: Tensor) -> Tensor:
        """Codes, scales or floats of the model [rows, ...] in the order of the equivalent one."""
        return values if self.rows is None else values[self.rows]

    def restore(self, values: Tensor) -> Tensor:
        """The inverse of `reorder`."""
        return values if self.rows is None else values[self.rows.argsort()]


@dataclass(frozen=True)
class Equivalent:
    """A model that computes the same. `config` describes it with the names of transformers, and
    `sources` has every weight of it by its name, in the order of computation."""

    config: ModelConfig
    sources: Mapping[str, Source]


def equivalent(config: ModelConfig, *, rope_interleaved: bool | None = None) -> Equivalent:
    """The equivalent model of a family that other engines know.

    `llama4_text` becomes `qwen3`, or `llama` if it has no norm of queries and keys; every other
    family stays what it is. `rope_interleaved` is the layout of RoPE that the engine wants, by
    default that of the family in transformers.
    """
    known = replace(config, model_type=known_family(config))
    interleaved = known.rope_interleaved if rope_interleaved is None else rope_interleaved
    rows = None
    if interleaved != config.rope_interleaved:
        rows = _row_order(config.head_dim, interleaved)
    shapes = config.parameter_shapes()
    names = _original_names(config, known)
    return Equivalent(
        known,
        {
            name: Source(names[name], _rows_of(rows, names[name], shapes))
            for name in known.parameter_shapes()
        },
    )


def known_family(config: ModelConfig) -> str:
    """The family of the equivalent model."""
    if config.model_type != "llama4_text":
        return config.model_type
    return "qwen3" if config.use_qk_norm else "llama"


def _original_names(config: ModelConfig, known: ModelConfig) -> dict[str, str | None]:
    """The name of each weight of the equivalent model in the model itself."""
    names: dict[str, str | None] = {name: name for name in known.parameter_shapes()}
    for layer in range(config.num_hidden_layers):
        original = asdict(config.layer_weights(layer))
        for part, name in asdict(known.layer_weights(layer)).items():
            if name is not None:
                names[name] = original[part]
    return names


def _row_order(head_dim: int, interleaved: bool) -> Tensor:
    """The rows of a head in the other layout of RoPE, as their places in the present one."""
    rows = torch.arange(head_dim)
    if interleaved:  # from halves
        return torch.stack(rows.chunk(2), -1).flatten()
    return torch.cat((rows[0::2], rows[1::2]))


def _rows_of(
    rows: Tensor | None, name: str | None, shapes: Mapping[str, tuple[int, ...]]
) -> Tensor | None:
    """`rows` for every head of this weight, if it gives queries or keys."""
    if rows is None or name is None or not name.endswith((".q_proj.weight", ".k_proj.weight")):
        return None
    heads = torch.arange(0, shapes[name][0], len(rows))
    return (heads[:, None] + rows).flatten()


def client_config(
    known: ModelConfig, bos: int | None, ends: tuple[int, ...], dtype: str
) -> dict[str, Any]:
    """The ``config.json`` of an equivalent model, as transformers and its relatives read it.

    `bos` and `ends` are the tokens that begin and end a text; `dtype` is that of its weights.
    """
    return {
        "architectures": [_CLASSES[known.model_type]],
        "model_type": known.model_type,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": bos,
        "dtype": dtype,
        "eos_token_id": list(ends) if len(ends) != 1 else ends[0],
        "head_dim": known.head_dim,
        "hidden_act": "silu",
        "hidden_size": known.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": known.intermediate_size,
        "max_position_embeddings": known.max_position_embeddings,
        "num_attention_heads": known.num_attention_heads,
        "num_hidden_layers": known.num_hidden_layers,
        "num_key_value_heads": known.num_key_value_heads,
        "rms_norm_eps": known.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": known.rope_theta,
        "tie_word_embeddings": known.tie_word_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": known.vocab_size,
    }


#: The class of transformers for each family.
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
}
