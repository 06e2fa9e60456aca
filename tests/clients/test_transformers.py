"""transformers runs the folder of `quantize --dequantize --as qwen3`, as do engines that know
Qwen3."""

from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from commands import run
from conftest import NANO
from transformers import AutoModelForCausalLM, AutoTokenizer

from clients.rows import PROMPTS, Shown


def test_transformers_writes_the_tokens_of_the_quantized_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], shown: Shown
) -> None:
    quantized, folder = tmp_path / "int4", tmp_path / "qwen3"
    command = ["quantize", "mobilellm-r1-nano-int4", "--checkpoint", NANO, "-o", quantized]
    assert run(capsys, *command, "--dequantize", folder, "--as", "qwen3").code == 0
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (type(model).__name__, model.dtype) == ("Qwen3ForCausalLM", torch.float32)
    for prompt in PROMPTS:
        made = run(
            capsys, "generate", quantized, "--prompt", prompt, "--max-new-tokens", "64", "--json"
        ).json
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        assert ids[0].tolist() == made["prompt_tokens"]
        with torch.inference_mode():
            tokens = model.generate(ids, do_sample=False, max_new_tokens=64)[0, ids.shape[1] :]
        ends = model.generation_config.eos_token_id
        while tokens[-1].item() in (ends if isinstance(ends, list) else [ends]):
            tokens = tokens[:-1]
        assert tokens.tolist() == made["tokens"]
    shown(
        client="transformers", version=version("transformers"), model="MobileLLM-R1 demo, as qwen3",
        target="quantize --dequantize --as qwen3",
        ran=f"greedy text of {len(PROMPTS)} prompts, equal to the quantized checkpoint's",
    )  # fmt: skip
