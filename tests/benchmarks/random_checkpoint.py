"""A checkpoint in a published shape with random weights: what sizes and times are measured on.

    python tests/benchmarks/random_checkpoint.py 140M build/random-140m
    taskset -c 0 /usr/bin/time -v mobilellm export mobilellm-r1-int4 \
        --checkpoint build/random-140m -o build/140m

There is no tokenizer, so that logits are compared on random tokens.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from exporter.model.config import parse_config
from exporter.tensors import write_safetensors

DEMO = Path(__file__).parents[2] / "examples" / "mobilellm-r1-nano" / "config.json"
#: MobileLLM-R1: layers, heads, k/v heads, hidden_size, intermediate_size (Meta's model table).
SIZES = {
    "140M": (15, 9, 3, 576, 2048),
    "360M": (15, 16, 4, 1024, 4096),
    "950M": (22, 24, 6, 1536, 6144),
}

#: Other families, as their own config.json has it.
OTHERS: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    },
    "OLMo-2-1B": {
        "model_type": "olmo2",
        "vocab_size": 100352,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 500000,
        "tie_word_embeddings": False,
        "eos_token_id": 100257,
    },
}


def mobilellm_config(size: str) -> dict[str, Any]:
    """The configuration of a MobileLLM-R1 model."""
    layers, heads, kv_heads, hidden, intermediate = SIZES[size]
    config: dict[str, Any] = json.loads(DEMO.read_text())
    return config | {
        "num_hidden_layers": layers,
        "no_rope_layers": [1] * layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "intermediate_size_mlp": intermediate,
        "vocab_size": 128256,
        "max_position_embeddings": 32768,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "pad_token_id": 128001,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Random weights in a published shape.")
    parser.add_argument("model", choices=[*SIZES, *OTHERS])
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    config = OTHERS.get(args.model) or mobilellm_config(args.model)
    shapes = parse_config(config, args.output / "config.json").parameter_shapes()
    generator = torch.Generator().manual_seed(0)

    def weight(name: str) -> torch.Tensor:
        """Gaussian as initialized for training; a normalization's weight is 1."""
        if len(shapes[name]) == 1:
            return torch.ones(shapes[name], dtype=torch.bfloat16)
        return (0.02 * torch.randn(shapes[name], generator=generator)).to(torch.bfloat16)

    args.output.mkdir(parents=True, exist_ok=True)
    layout = {name: (torch.bfloat16, shape) for name, shape in shapes.items()}
    write_safetensors(args.output / "model.safetensors", layout, weight, {"format": "pt"})
    (args.output / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
