"""Costly work is done once per run: hashing a checkpoint, parsing schemes, reading weights."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrating import quantize_here, recipe_of, small_checkpoint
from conftest import LLAMA, TEXT, MakeCheckpoint

from exporter import pipeline
from exporter.calibration.calibrate import IDENTITY, START, _keep_or_clear
from exporter.files import read_json, write_json
from exporter.inference.reference import score, score_each
from exporter.model.checkpoint import open_checkpoint
from exporter.model.config import EMBEDDING
from exporter.pipeline import no_progress
from exporter.quantization import quantized_checkpoint
from exporter.quantization.activations import Roundings, round_rows_to_int8
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint
from exporter.quantization.schemes import parse_scheme
from exporter.recipe import parse_recipe

#: Lowering, the check of its values, of the artifact's integers, and of its logits.
READS = 4


@pytest.mark.parametrize("method", ["mse", "gptq", "distill"])
def test_a_quantization_hashes_the_checkpoint_once(
    method: str, make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, hashed = tmp_path / "text.txt", Counter[Path]()
    text.write_text(TEXT)
    checkpoint = small_checkpoint(make_checkpoint)

    def counted(path: Path, sha256: Any = quantized_checkpoint.sha256) -> str:
        hashed[path] += 1
        found: str = sha256(path)
        return found

    monkeypatch.setattr(quantized_checkpoint, "sha256", counted)
    budget = {} if method == "mse" else {"budget": "6 bits"}
    quantize_here(recipe_of(method, text, **budget), checkpoint, tmp_path / "out")
    own = {path.name: count for path, count in hashed.items() if path.parent == checkpoint.path}
    assert own == dict.fromkeys(own, 1)
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= own.keys()


@pytest.mark.parametrize("target", ["executorch", "onnx"])
def test_an_export_parses_each_scheme_once_a_stage_and_reads_each_weight_four_times(
    target: str, make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, parsed = Counter[str](), Counter[object]()
    read = QuantizedCheckpoint.read

    def counted(self: QuantizedCheckpoint, name: str) -> Any:
        reads[name] += 1
        return read(self, name)

    def counted_parse(text: object, subject: str) -> Any:
        parsed[text] += 1
        return parse_scheme(text, subject)

    monkeypatch.setattr(QuantizedCheckpoint, "read", counted)
    monkeypatch.setattr(quantized_checkpoint, "parse_scheme", counted_parse)
    checkpoint = open_checkpoint(make_checkpoint(base=LLAMA, num_hidden_layers=3))
    targets = [{"target": target, "max_context": 64}]
    recipe = parse_recipe({"name": "t", "targets": targets}, "t")
    result = pipeline.export(recipe, checkpoint, tmp_path / "out", no_progress)
    assert result.bundle is not None
    matrices = [name for name in reads if result.quantized.schemes[name].bits]
    often = {name: reads[name] for name in matrices if reads[name] != READS}
    assert len(matrices) == 2 + 7 * 3 and often == {}
    # The quantized checkpoint is opened twice: when it is written, and with the bundle.
    assert parsed == {"int4-g32": 2, "float": 2}


def test_one_pass_gives_the_logits_of_each_rounding_and_shows_the_first(
    make_checkpoint: MakeCheckpoint,
) -> None:
    checkpoint = open_checkpoint(make_checkpoint(base=LLAMA))
    tokens, positions = [3, 1, 4, 1, 5, 9, 2, 6], [2, 5, 7]
    alone = [score(checkpoint, tokens, positions, each) for each in (None, round_rows_to_int8)]
    shown, shown_alone = list[tuple[str, str, float]](), list[tuple[str, str, float]]()
    together = score_each(
        checkpoint, tokens, positions, [Roundings(), Roundings(round_rows_to_int8)],
        lambda name, which, values: shown.append((name, which, values.sum().item())),
    )  # fmt: skip
    score(
        checkpoint, tokens, positions,
        observe=lambda name, which, values: shown_alone.append((name, which, values.sum().item())),
    )  # fmt: skip
    assert [torch.equal(*pair) for pair in zip(alone, together, strict=True)] == [True, True]
    assert not torch.equal(*together)
    assert shown == shown_alone and shown


def test_what_another_version_began_is_begun_anew(tmp_path: Path) -> None:
    """In format 1 a calibration kept codes unpacked, and said nothing of a format."""
    schemes, identity = {EMBEDDING: parse_scheme("int4-g32", "")}, {"source": {"a": "b"}}
    old = {**identity, "schemes": {EMBEDDING: "int4-g32"}}
    write_json(tmp_path / IDENTITY, old)
    (tmp_path / START).write_bytes(b"codes of a byte each")
    _keep_or_clear(tmp_path, identity, schemes)
    assert not (tmp_path / START).exists()
    (tmp_path / START).write_bytes(b"what this version began")
    _keep_or_clear(tmp_path, identity, schemes)
    assert (tmp_path / START).exists()
    assert read_json(tmp_path / IDENTITY)["format"] == 2
