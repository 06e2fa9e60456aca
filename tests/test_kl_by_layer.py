"""KL by layer against whole models with one layer replaced, and what it finds."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrating import Replaced, quantize_here, recipe_of, small_checkpoint
from commands import run
from conftest import FAMILIES, NANO, TEXT, MakeCheckpoint
from safetensors.torch import load_file, save_file

from exporter.bundle.bundle import Bundle
from exporter.errors import InputError
from exporter.evaluation.layers import kl_by_layer, quantized_weights
from exporter.evaluation.perplexity import score_text
from exporter.files import read_json, sha256, write_json
from exporter.inference.reference import ReferenceRunner
from exporter.model.checkpoint import Checkpoint, open_checkpoint
from exporter.model.decoder import load_decoder
from exporter.progress import no_step
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint, open_quantized
from exporter.quantization.schemes import FLOAT
from exporter.text.sequences import cut_sequences
from exporter.text.tokenizer import load_tokenizer
from exporter.verification.runs import SAMPLE_TEXT

Capture = pytest.CaptureFixture[str]
Pair = tuple[Checkpoint, QuantizedCheckpoint]
LAYER_1 = "model.layers.1"


@pytest.fixture
def pair(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Callable[..., Pair]:
    """A small checkpoint, and the quantized one."""

    def make(base: Mapping[str, Any] = FAMILIES["llama4_text"], **changes: Any) -> Pair:
        checkpoint = small_checkpoint(make_checkpoint, base, **changes)
        recipe = recipe_of("absmax", [{"tokens": 64}])
        return checkpoint, quantize_here(recipe, checkpoint, tmp_path / "quantized")

    return make


def sequences_of(count: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(96, (count, length), generator=generator).tolist()


def measured(one: Pair, sequences: list[list[int]], prefill: int = 1) -> dict[str, float]:
    checkpoint, quantized = one
    decoder = load_decoder(checkpoint, len(sequences[0]))
    found = kl_by_layer(decoder, quantized, sequences, no_step, prefill)
    return {layer.layer: layer.kl for layer in found}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("base", FAMILIES.values(), ids=FAMILIES)
def test_the_kl_of_a_layer_is_that_of_a_whole_model_with_this_layer_alone_quantized(
    base: dict[str, Any], tied: bool, pair: Callable[..., Pair]
) -> None:
    checkpoint, quantized = pair(base, tie_word_embeddings=tied)
    sequences = sequences_of(3, 20)
    found = measured((checkpoint, quantized), sequences, prefill=4)
    assert list(found) == [
        "model.embed_tokens", "model.layers.0", LAYER_1, *([] if tied else ["lm_head"])
    ]  # fmt: skip
    reference = ReferenceRunner(checkpoint, 20)
    for layer, kl in found.items():
        names = [n for n in quantized.schemes if n.startswith((f"{layer}.", f"{layer}.weight"))]
        changed = Replaced(checkpoint, {name: quantized.float_weight(name) for name in names})
        expected = score_text(ReferenceRunner(changed, 20), sequences, no_step, reference, 4).kl
        assert kl == pytest.approx(expected, rel=1e-3)
        assert kl > 1e-5


def test_the_number_of_sequences_at_once_does_not_matter(
    pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, sequences = pair(), sequences_of(5, 70)
    whole = measured(one, sequences)
    for positions in (1, 140):  # one sequence, two
        monkeypatch.setattr("exporter.evaluation.layers._POSITIONS", positions)
        assert measured(one, sequences) == pytest.approx(whole, rel=1e-4)


def test_a_layer_with_bad_codes_stands_out(finished_bundle: Bundle, tmp_path: Path) -> None:
    """The rows of codes of one weight are in the wrong order; no other layer changes."""
    folder = Path(shutil.copytree(finished_bundle.path / "quantized", tmp_path / "quantized"))
    checkpoint, text = open_checkpoint(NANO), [SAMPLE_TEXT.read_text()]
    sequences = cut_sequences(text, load_tokenizer(NANO), 0, 100, 200)
    whole = measured((checkpoint, open_quantized(folder)), sequences)
    weights = folder / "quantized.safetensors"
    stored = load_file(weights)
    codes = "model.layers.3.feed_forward.down_proj.weight.codes"
    stored[codes] = stored[codes].flip(0)
    save_file(stored, weights, {"format": "pt"})
    manifest = read_json(folder / "quantization.json")
    manifest["files"][weights.name] = sha256(weights)
    write_json(folder / "quantization.json", manifest)
    found = measured((checkpoint, open_quantized(folder)), sequences)
    bad, good = (one.pop("model.layers.3") for one in (found, whole))
    assert bad > 3 * max(found.values()) and bad > 3 * good
    assert found == whole


def test_a_layer_left_in_float_has_none_and_costs_no_run(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = small_checkpoint(make_checkpoint)
    recipe = recipe_of("absmax", [{"tokens": 64}])
    overrides = {"model.layers.0.*": "float"}
    changed = recipe.quantization.model_copy(update={"overrides": overrides})
    quantized = quantize_here(
        recipe.model_copy(update={"quantization": changed}), checkpoint, tmp_path / "out"
    )
    layers = quantized_weights(checkpoint.config, quantized)
    assert layers["model.layers.0"] == []
    assert all(quantized.schemes[name] != FLOAT for name in layers[LAYER_1])
    seen = list[tuple[int, int, str]]()
    decoder = load_decoder(checkpoint, 20)
    found = kl_by_layer(decoder, quantized, sequences_of(1, 20), lambda *step: seen.append(step))
    assert [layer.kl > 0 for layer in found] == [True, False, True]
    assert [part for _, _, part in seen] == ["", "model.embed_tokens", LAYER_1, "logits"]
    done = [step[0] for step in seen]
    assert done == sorted(done) and done[0] == 0 and abs(done[-1] - seen[-1][1]) <= 1


def test_logits_that_are_no_numbers_are_refused_with_the_layer(
    pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, quantized = pair()
    original = QuantizedCheckpoint.float_weight

    def damaged(self: QuantizedCheckpoint, name: str) -> torch.Tensor:
        weight = original(self, name)
        return weight * torch.inf if name.startswith(LAYER_1) else weight

    monkeypatch.setattr(QuantizedCheckpoint, "float_weight", damaged)
    with pytest.raises(InputError, match=rf"{LAYER_1}: gives logits that are not finite"):
        measured((checkpoint, quantized), sequences_of(1, 20))


# From the command line.

SIZED = ("--sequence-length", "32", "--max-tokens", "64")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.txt"
    path.write_text(TEXT)
    return path


def test_a_quantized_checkpoint_and_its_bundle_have_the_same_layers(
    finished_bundle: Bundle, data: Path, capsys: Capture
) -> None:
    options = ["--data", data, "--reference", NANO, *SIZED, "--layers"]
    found = [
        run(capsys, "evaluate", path, *options, "--json").json["kl_by_layer"]
        for path in (finished_bundle.path / "quantized", finished_bundle.path)
    ]
    assert found[0] == found[1]
    names = ["model.embed_tokens", *(f"model.layers.{n}" for n in range(6))]
    assert [row["layer"] for row in found[0]] == names
    assert all(row["kl"] > 0 for row in found[0])
    shown = run(capsys, "evaluate", finished_bundle.path / "quantized", *options)
    assert "By quantized layer" in shown.out and "model.layers.5" in shown.out
    assert "layers" in shown.err


def test_without_the_option_no_layer_is_measured(data: Path, capsys: Capture) -> None:
    outcome = run(capsys, "evaluate", NANO, "--data", data, *SIZED, "--json")
    assert outcome.json["kl_by_layer"] is None


@pytest.mark.parametrize(
    ("path", "reference", "reason"),
    [
        ("onnx", NANO, "has no quantized checkpoint"),
        ("quantized", None, "Give --data FILE and --reference CHECKPOINT"),
        ("quantized", "quantized", "is not a float checkpoint"),
        ("quantized", "another", "has weights of other names or shapes"),
    ],
)
def test_what_has_no_layers_to_compare_is_refused_before_any_work(
    path: str,
    reference: Path | str | None,
    reason: str,
    finished_bundle: Bundle,
    data: Path,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    if reference == "quantized":
        reference = finished_bundle.path / "quantized"
    elif reference == "another":
        reference = Path(shutil.copytree(NANO, tmp_path / "another"))
        config = read_json(reference / "config.json")
        layers = config["num_hidden_layers"] = config["num_hidden_layers"] - 1
        config["no_rope_layers"] = config["no_rope_layers"][:layers]
        write_json(reference / "config.json", config)
        weights = load_file(reference / "model.safetensors")
        kept = {name: w for name, w in weights.items() if f"layers.{layers}." not in name}
        save_file(kept, reference / "model.safetensors", {"format": "pt"})
    asked = ["--reference", reference] if reference else []
    outcome = run(
        capsys, "evaluate", finished_bundle.path / path, "--data", data, *asked, *SIZED, "--layers"
    )
    assert (outcome.code, outcome.out) == (2, "")
    assert reason in outcome.err and "text …" not in outcome.err
