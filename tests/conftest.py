"""Fixtures of several tests: the demo checkpoint, small random ones, and one finished bundle."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from devices.files import cache_folder
from exporter.bundle.bundle import Bundle
from exporter.model.checkpoint import open_checkpoint
from exporter.model.config import parse_config
from exporter.pipeline import export, no_progress
from exporter.recipe import load_recipe

pytest_plugins = ["device_bed", "lowering"]

ROOT = Path(__file__).parent.parent
NANO = ROOT / "examples" / "mobilellm-r1-nano"

#: MobileLLM-R1's configuration with small numbers; `llama` has its own keys.
LLAMA4 = {
    "model_type": "llama4_text",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "intermediate_size_mlp": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "attention_chunk_size": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 8000000.0,
    "rope_scaling": None,
    "use_qk_norm": True,
    "no_rope_layers": [1, 1],
    "interleave_moe_layer_step": 0,
    "moe_layers": [],
    "tie_word_embeddings": True,
    "attn_temperature_tuning": False,
    "bos_token_id": 0,
    "eos_token_id": [1, 2],
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
OLMO2 = {
    "model_type": "olmo2",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}

TEXT = "".join(f"Ada has {n} eggs and finds {n * 7 % 11} more.\n" for n in range(120))
#: A small configuration of each family of models.
FAMILIES: dict[str, dict[str, Any]] = {
    str(base["model_type"]): base for base in (LLAMA4, LLAMA, QWEN3, OLMO2)
}

MakeCheckpoint = Callable[..., Path]


def random_weights(config: dict[str, Any], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = parse_config(config, Path("config.json")).parameter_shapes()
    return {
        name: (
            torch.randn(shape, generator=generator) * 0.05
            if len(shape) == 2
            else 1 + 0.1 * torch.randn(shape, generator=generator)
        ).to(dtype)
        for name, shape in shapes.items()
    }


def write_checkpoint(
    folder: Path, config: dict[str, Any], weights: dict[str, torch.Tensor]
) -> Path:
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> MakeCheckpoint:
    """make_checkpoint(base=LLAMA4, dtype=torch.bfloat16, name="model", **changes) → folder.

    A change to None removes nothing: it writes null. Use `weights=` to give tensors of your own.
    """

    def make(
        base: dict[str, Any] = LLAMA4,
        dtype: torch.dtype = torch.bfloat16,
        name: str = "model",
        weights: dict[str, torch.Tensor] | None = None,
        **changes: Any,
    ) -> Path:
        config = {**base, **changes}
        if weights is None:
            weights = random_weights(config, dtype)
        return write_checkpoint(tmp_path / name, config, weights)

    return make


@pytest.fixture(autouse=True)
def own_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Path:
    """The cache of one test, never the user's. Tests of devices do use the user's, so that the
    native runner is compiled once."""
    if request.path.parent.name == "devices":
        return cache_folder()
    folder = tmp_path / "cache"
    monkeypatch.setenv("MOBILELLM_CACHE", str(folder))
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A small file to calibrate on."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="session")
def nano() -> Path:
    return NANO


@pytest.fixture(scope="session")
def finished_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The demo bundle, made once. Read it only; `bundle_copy` may be changed."""
    out = tmp_path_factory.mktemp("bundle") / "nano"
    result = export(load_recipe("mobilellm-r1-nano-int4"), open_checkpoint(NANO), out, no_progress)
    assert result.bundle is not None, [check for check in result.checks if not check.passed]
    return result.bundle


@pytest.fixture
def bundle_copy(finished_bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_bundle.path, tmp_path / "bundle"))
