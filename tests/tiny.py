"""The smallest checkpoint with a tokenizer, and its bundle: for hundreds of commands."""

import json
from pathlib import Path

import pytest
import torch
from conftest import LLAMA4, random_weights, write_checkpoint
from tokenizers import Tokenizer, models, pre_tokenizers

from exporter.cli import main

TARGET = "onnx"
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def write_tiny_checkpoint(folder: Path) -> Path:
    """A random model that reads ASCII text one character at a time."""
    write_checkpoint(folder, LLAMA4, random_weights(LLAMA4, torch.bfloat16))
    words = ["<unk>", *(chr(code) for code in range(32, 127))]
    vocabulary = {word: place for place, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    files = {
        "tokenizer_config.json": {"bos_token": "<unk>", "chat_template": TEMPLATE},
        "generation_config.json": {"bos_token_id": 0, "eos_token_id": [1, 2]},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def write_tiny_bundle(checkpoint: Path, recipe: Path, out: Path) -> Path:
    with pytest.raises(SystemExit) as ended:
        main(["export", str(recipe), "--checkpoint", str(checkpoint), "-o", str(out)])
    assert ended.value.code == 0
    return out


def write_sharded(folder: Path) -> Path:
    """Rename the weights of a checkpoint to a shard, with its index."""
    names = random_weights(LLAMA4, torch.bfloat16)
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    weight_map = dict.fromkeys(names, "model-1.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
