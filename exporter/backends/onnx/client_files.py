"""The files that clients read beside the graph: its shapes, its tokenizer, and how it is run."""

from collections.abc import Mapping
from typing import Any

from exporter.backends.onnx import (
    CHUNK,
    CONFIG,
    FLOAT_PRODUCTS,
    GENAI_CONFIG,
    TOKENIZER_CONFIG,
    Target,
)
from exporter.model.equivalent import client_config, equivalent
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint
from exporter.text.client_files import tokenizer_config


def client_files(
    quantized: QuantizedCheckpoint, target: Target, kind: str, graph: str
) -> Mapping[str, dict[str, Any]]:
    """Name → content of each JSON file, for the graph of this name and data type."""
    files = {
        CONFIG: _config(quantized, target, kind),
        GENAI_CONFIG: _genai_config(quantized, target, graph),
    }
    tokenizer = tokenizer_config(quantized.path, quantized.bos_token_id, quantized.eos_token_ids)
    if tokenizer is not None:
        files[TOKENIZER_CONFIG] = tokenizer
    return files


def _config(quantized: QuantizedCheckpoint, target: Target, kind: str) -> dict[str, Any]:
    """``config.json`` for optimum and transformers.js, which ask it for the shape of the cache.

    It names a family that they know: of `llama4_text`, optimum ignores the number of k/v heads. It
    describes shapes only, since the graph is what runs: that keeps the model's own RoPE and order
    of rows.
    """
    known = equivalent(quantized.config).config
    dtype = "float16" if target.activations == "float16" else "float32"
    found = client_config(known, quantized.bos_token_id, quantized.eos_token_ids, dtype)
    # The graph has tables for so many positions.
    found["max_position_embeddings"] = target.max_context
    found["transformers.js_config"] = {"dtype": kind, "use_external_data_format": True}
    return found


def _genai_config(quantized: QuantizedCheckpoint, target: Target, graph: str) -> dict[str, Any]:
    """The configuration for onnxruntime-genai. `type` only selects its decoder-only loop.

    The portable form has no mask, its cache grows, and its products are to be float ones.
    """
    config, ends = quantized.config, list(quantized.eos_token_ids)
    end, contrib = ends[0] if ends else 0, target.form == "contrib"
    mask = {"attention_mask": "attention_mask"} if contrib else {}
    options = {} if contrib else dict([FLOAT_PRODUCTS])
    return {
        "model": {
            "type": "llama",
            "bos_token_id": quantized.bos_token_id if quantized.bos_token_id is not None else end,
            "eos_token_id": ends or end,
            "pad_token_id": end,
            "context_length": target.max_context,
            "vocab_size": config.vocab_size,
            "decoder": {
                "filename": graph,
                "session_options": {
                    "log_id": "onnxruntime-genai",
                    "provider_options": [],
                    **options,
                },
                "hidden_size": config.hidden_size,
                "head_size": config.head_dim,
                "num_attention_heads": config.num_attention_heads,
                "num_key_value_heads": config.num_key_value_heads,
                "num_hidden_layers": config.num_hidden_layers,
                "inputs": {
                    "input_ids": "input_ids",
                    **mask,
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "max_length": target.max_context,
            "do_sample": False,
            "num_beams": 1,
            "past_present_share_buffer": contrib,
            "chunk_size": CHUNK,
        },
    }
