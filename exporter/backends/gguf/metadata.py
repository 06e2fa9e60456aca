"""The metadata of a GGUF file: what the model is, and what llama.cpp must know to compute it.

The keys are those of the GGUF specification; the two that begin with ``mobilellm.`` are our own.
There is no time and no path in them, so that two lowerings give the same bytes.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gguf
from gguf import GGMLQuantizationType, GGUFValueType, LlamaFileType

from exporter.backends.gguf import Target
from exporter.backends.gguf.vocabulary import tokenizer_fields
from exporter.files import sha256
from exporter.model.config import ModelConfig
from exporter.model.licence import LicenceTerms
from exporter.quantization.quantized_checkpoint import MANIFEST, QuantizedCheckpoint

QUANTIZED_HASH, MAX_CONTEXT = "mobilellm.quantized_sha256", "mobilellm.max_context"
_HUB = "https://huggingface.co/"
_FILE_TYPES = {
    GGMLQuantizationType.F32: LlamaFileType.ALL_F32,
    GGMLQuantizationType.F16: LlamaFileType.MOSTLY_F16,
    GGMLQuantizationType.BF16: LlamaFileType.MOSTLY_BF16,
    GGMLQuantizationType.Q4_0: LlamaFileType.MOSTLY_Q4_0,
    GGMLQuantizationType.Q8_0: LlamaFileType.MOSTLY_Q8_0,
}
_TYPES = {
    str: GGUFValueType.STRING,
    bool: GGUFValueType.BOOL,
    int: GGUFValueType.UINT32,
    float: GGUFValueType.FLOAT32,
}


@dataclass(frozen=True)
class Field:
    """A value with its type, and for an array with that of its entries."""

    value: Any
    type: GGUFValueType
    entries: GGUFValueType | None = None


def fields(
    quantized: QuantizedCheckpoint,
    known: ModelConfig,
    target: Target,
    sizes: Sequence[tuple[GGMLQuantizationType, int]],
) -> dict[str, Field]:
    """All metadata in the order of the file, without ``general.architecture``.

    `known` is the equivalent model that is written, `sizes` the type and the bytes of each tensor.
    """
    found: dict[str, Any] = {"general.type": "model"}
    found |= {"general.name": target.name} if target.name else {}
    found |= _licence(quantized.licence) | _base_model(target.base_model)
    found["general.quantization_version"] = gguf.GGML_QUANT_VERSION
    found["general.file_type"] = int(_file_type(sizes))
    found |= _architecture(known)
    found[MAX_CONTEXT] = target.max_context
    found[QUANTIZED_HASH] = sha256(quantized.path / MANIFEST)
    found |= tokenizer_fields(
        quantized.path, quantized.config, quantized.bos_token_id, quantized.eos_token_ids
    )
    return {key: _field(value) for key, value in found.items() if value != []}


def _architecture(known: ModelConfig) -> dict[str, Any]:
    return {
        f"{known.model_type}.{key}": value
        for key, value in {
            "context_length": known.max_position_embeddings,
            "embedding_length": known.hidden_size,
            "block_count": known.num_hidden_layers,
            "feed_forward_length": known.intermediate_size,
            "attention.head_count": known.num_attention_heads,
            "attention.head_count_kv": known.num_key_value_heads,
            "attention.key_length": known.head_dim,
            "attention.value_length": known.head_dim,
            "attention.layer_norm_rms_epsilon": known.rms_norm_eps,
            "rope.dimension_count": known.head_dim,
            "rope.freq_base": known.rope_theta,
            "vocab_size": known.vocab_size,
        }.items()
    }


def _licence(terms: LicenceTerms | None) -> dict[str, str]:
    """The keys of a licence. A link to a file beside the checkpoint leads nowhere from here."""
    if terms is None:
        return {}
    link = terms.link if terms.link.startswith("http") else ""
    given = {"": terms.id, ".name": terms.name, ".link": link}
    return {f"general.license{key}": value for key, value in given.items() if value}


def _base_model(name: str) -> dict[str, Any]:
    if not name:
        return {}
    owner, _, model = name.rpartition("/")
    given = {"name": model, "organization": owner, "repo_url": f"{_HUB}{name}" if owner else ""}
    return {"general.base_model.count": 1} | {
        f"general.base_model.0.{key}": value for key, value in given.items() if value
    }


def _file_type(sizes: Sequence[tuple[GGMLQuantizationType, int]]) -> LlamaFileType:
    """The type that most bytes have: llama.cpp shows it, and computes with those of the tensors."""
    total = Counter[GGMLQuantizationType]()
    for kind, size in sizes:
        total[kind] += size
    return _FILE_TYPES[total.most_common(1)[0][0]]


def _field(value: Any) -> Field:
    if isinstance(value, list):
        entries = GGUFValueType.STRING if isinstance(value[0], bytes) else GGUFValueType.INT32
        return Field(value, GGUFValueType.ARRAY, entries)
    return Field(value, _TYPES[type(value)])
