"""A checkpoint of MobileLLM-R1's shape with random weights: what sizes and times are measured on.

    python tests/benchmarks/random_checkpoint.py 140M build/random-140m
    taskset -c 0 /usr/bin/time -v mobilellm export mobilellm-r1-int4 \
        --checkpoint build/random-140m -o build/140m

There is no tokenizer, so that logits are compared on random tokens.
"""

import argparse
import json
from pathlib import Path

import torch

from exporter.files import write_safetensors
from exporter.model.checkpoint import parse_config

DEMO = Path(__file__).parents[2] / "examples" / "mobilellm-r1-nano" / "config.json"
#: Size: layers, heads, k/v heads, hidden_size, intermediate_size (Meta's model table).
SHAPES = {
    "140M": (15, 9, 3, 576, 2048),
    "360M": (15, 16, 4, 1024, 4096),
    "950M": (22, 24, 6, 1536, 6144),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Random weights in MobileLLM-R1's shape.")
    parser.add_argument("size", choices=SHAPES)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    layers, heads, kv_heads, hidden, intermediate = SHAPES[args.size]
    config = json.loads(DEMO.read_text()) | {
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
