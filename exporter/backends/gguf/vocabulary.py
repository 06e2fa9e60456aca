"""Stand-in until the vocabulary is merged."""

from pathlib import Path

from exporter.model.config import ModelConfig


def tokenizer_fields(
    folder: Path, config: ModelConfig, bos: int | None, ends: tuple[int, ...]
) -> dict[str, str | bool | int | list[bytes] | list[int]]:
    """The fields of llama.cpp's "no vocabulary" model."""
    return {"tokenizer.ggml.model": "none"}
