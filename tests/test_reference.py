"""The torch reference: one layer at a time, with a cache, and with int8 rounding simulated."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, MakeCheckpoint
from torch import Tensor

from exporter.bundle.bundle import Bundle
from exporter.inference import reference
from exporter.inference.reference import ReferenceRunner, score
from exporter.model import decoder
from exporter.model.checkpoint import open_checkpoint
from exporter.model.config import EMBEDDING
from exporter.model.decoder import load_decoder
from exporter.quantization.activations import (
    round_blocks_to_int8,
    round_prompt_to_int8,
    round_rows_to_int8,
)
from exporter.text.tokenizer import load_tokenizer

KINDS: list[tuple[dict[str, Any], bool]] = [
    (base, tied) for base in FAMILIES.values() for tied in (True, False)
]  # fmt: skip
each_kind = pytest.mark.parametrize(
    ("base", "tied"),
    KINDS,
    ids=[f"{b['model_type']}-{'tied' if t else 'untied'}" for b, t in KINDS],
)


def tokens_of(length: int) -> list[int]:
    return torch.randint(96, (length,), generator=torch.Generator().manual_seed(1)).tolist()


# Logits.


@each_kind
def test_score_gives_the_logits_of_the_whole_decoder(
    base: dict[str, Any], tied: bool, make_checkpoint: MakeCheckpoint
) -> None:
    checkpoint = open_checkpoint(make_checkpoint(base, tie_word_embeddings=tied))
    tokens = tokens_of(30)
    with torch.inference_mode():
        whole = load_decoder(checkpoint, 30).score(torch.tensor([tokens]))[0]
    assert torch.allclose(score(checkpoint, tokens, range(30), None), whole, atol=1e-5, rtol=0)


@each_kind
def test_score_gives_the_logits_of_the_runner_at_every_position(
    base: dict[str, Any], tied: bool, make_checkpoint: MakeCheckpoint
) -> None:
    checkpoint = open_checkpoint(make_checkpoint(base, tie_word_embeddings=tied))
    runner, tokens = ReferenceRunner(checkpoint, 30), tokens_of(30)
    steps = [runner.prefill(tokens[:5]), *(runner.decode(token) for token in tokens[5:])]
    scored = score(checkpoint, tokens, range(4, 30), None)
    assert torch.allclose(torch.stack(steps), scored, atol=1e-5, rtol=0)


def test_score_gives_the_positions_asked_for_in_their_order(nano: Path) -> None:
    checkpoint, tokens = open_checkpoint(nano), tokens_of(20)
    whole = score(checkpoint, tokens, range(20), None)
    some = score(checkpoint, tokens, [7, 19, 0], None)
    assert torch.allclose(some, whole[[7, 19, 0]], atol=1e-4, rtol=0)
    assert not torch.allclose(whole[7], whole[19], atol=1)


def test_score_of_a_quantized_checkpoint_is_that_of_its_integers(
    finished_bundle: Bundle, nano: Path
) -> None:
    quantized, tokens = finished_bundle.quantized, tokens_of(20)
    runner = ReferenceRunner(quantized, 20)
    scored = score(quantized, tokens, [19], None)[0]
    assert torch.allclose(runner.prefill(tokens), scored, atol=1e-4, rtol=0)
    assert not torch.allclose(score(open_checkpoint(nano), tokens, [19], None)[0], scored, atol=0.1)


def test_a_runner_starts_a_new_text_with_every_prefill(nano: Path) -> None:
    runner, tokens = ReferenceRunner(open_checkpoint(nano), 30), tokens_of(20)
    first = runner.prefill(tokens)
    runner.decode(3)
    runner.prefill(tokens_of(9))
    assert torch.equal(runner.prefill(tokens), first)


def test_a_prompt_in_pieces_gives_the_logits_of_the_prompt_at_once(nano: Path) -> None:
    runner, tokens = ReferenceRunner(open_checkpoint(nano), 20), tokens_of(20)
    at_once = runner.prefill(tokens)
    runner.prefill(tokens[:1])
    pieces = [runner.decode(token) for token in tokens[1:]]
    assert torch.allclose(pieces[-1], at_once, atol=1e-4, rtol=0)


def test_attention_in_parts_gives_the_logits_of_attention_at_once(
    nano: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, tokens = ReferenceRunner(open_checkpoint(nano), 21), tokens_of(20)
    at_once, next_one = runner.prefill(tokens), runner.decode(3)
    monkeypatch.setattr(decoder, "QUERIES_AT_ONCE", 7)
    assert torch.allclose(runner.prefill(tokens), at_once, atol=1e-4, rtol=0)
    assert torch.allclose(runner.decode(3), next_one, atol=1e-4, rtol=0)


def test_scores_are_shown_in_parts_and_none_is_left_out(
    nano: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shown() -> dict[str, Tensor]:
        found = dict[str, list[Tensor]]()

        def observe(name: str, kind: str, values: Tensor) -> None:
            if kind == "scores":
                found.setdefault(name, []).append(values)

        score(open_checkpoint(nano), tokens_of(20), [19], None, observe)
        counts.update(len(parts) for parts in found.values())
        return {name: torch.cat(parts, 2) for name, parts in found.items()}

    counts = set[int]()
    whole = shown()
    monkeypatch.setattr(reference, "QUERIES_AT_ONCE", 7)
    parts = shown()
    assert counts == {1, 3}
    assert all(torch.allclose(parts[name], whole[name], atol=1e-4) for name in whole)


def test_logits_are_one_float32_vector_of_the_vocabulary(nano: Path) -> None:
    runner = ReferenceRunner(open_checkpoint(nano), 8)
    logits = runner.prefill([1, 2, 3])
    assert (logits.shape, logits.dtype, runner.context) == ((512,), torch.float32, 8)


def test_a_tied_output_layer_takes_no_memory_of_its_own(nano: Path) -> None:
    decoder = load_decoder(open_checkpoint(nano), 8)
    assert decoder.lm_head.weight is decoder.model.embed_tokens.weight
    assert torch.equal(decoder.lm_head.weight, open_checkpoint(nano).float_weight(EMBEDDING))


def test_the_demo_checkpoint_predicts_its_own_kind_of_text(nano: Path) -> None:
    """A model that is loaded wrongly is no better than chance: ln 512 = 6.2 nats."""
    tokens = load_tokenizer(nano).encode(
        "Ada has 12 eggs. Ada finds 7 more. Ada sells 5. How many eggs does Ada have now?"
    )
    logits = score(open_checkpoint(nano), tokens[:-1], range(len(tokens) - 1), None)
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[1:]))
    assert loss < 3


# Rounding of activations.


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


ACTIVATIONS: dict[str, Tensor] = {
    "normal": normal(2, 6, 64),
    "rows of every size": normal(2, 6, 64) * torch.logspace(-20, 20, 6)[:, None],
    "positive": normal(2, 6, 64).abs() + 3,
    "negative": -normal(2, 6, 64).abs() - 3,
    "an outlier": normal(2, 6, 64).index_fill(2, torch.tensor([5]), 300.0),
    "constant": torch.full((2, 6, 64), 0.7),
    "negative constant": torch.full((2, 6, 64), -0.7),
    "zero rows": normal(2, 6, 64).index_fill(1, torch.tensor([1, 4]), 0.0),
    "all zero": torch.zeros(2, 6, 64),
}
each_activation = pytest.mark.parametrize("x", ACTIVATIONS.values(), ids=ACTIVATIONS)


def _row_step(x: Tensor) -> Tensor:
    return (x.amax(-1, keepdim=True).clamp(min=0) - x.amin(-1, keepdim=True).clamp(max=0)) / 255


def _prompt_step(x: Tensor) -> Tensor:
    """The first four rows share their range."""
    first = x[:, :4].flatten(1)
    shared = (first.amax(-1).clamp(min=0) - first.amin(-1).clamp(max=0)) / 255
    return torch.cat((shared[:, None, None].expand(-1, 4, -1), _row_step(x[:, 4:])), 1)


def _block_step(x: Tensor) -> Tensor:
    step = x.unflatten(-1, (2, 32)).abs().amax(-1) / 127
    return step.repeat_interleave(32, -1)


#: Each rounding, with the step between two codes that its definition gives.
ROUNDINGS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], int]] = {
    "rows": (round_rows_to_int8, _row_step, 256),
    "prompt": (lambda x: round_prompt_to_int8(x, 4, 8), _prompt_step, 256),
    "blocks": (lambda x: round_blocks_to_int8(x, 32), _block_step, 255),
}
each_rounding = pytest.mark.parametrize(
    ("rounding", "step"), [row[:2] for row in ROUNDINGS.values()], ids=ROUNDINGS
)


@each_activation
@each_rounding
def test_rounding_is_off_by_half_a_step_at_most(
    rounding: Callable[[Tensor], Tensor], step: Callable[[Tensor], Tensor], x: Tensor
) -> None:
    rounded = rounding(x)
    assert rounded.shape == x.shape
    # Half a step, and what float32 itself loses in codes of up to 255.
    assert ((rounded - x).abs() <= step(x) * 0.5001).all()


@each_activation
@each_rounding
def test_rounding_keeps_zero_exactly(
    rounding: Callable[[Tensor], Tensor], step: Callable[[Tensor], Tensor], x: Tensor
) -> None:
    holed = x.clone()
    holed[..., ::3] = 0
    rounded = rounding(holed)
    assert torch.isfinite(rounded).all()
    assert not rounded[..., ::3].any()


@each_rounding
def test_rounding_of_a_constant_keeps_the_constant(
    rounding: Callable[[Tensor], Tensor], step: Callable[[Tensor], Tensor]
) -> None:
    for value in (0.7, -0.7, 1e-20, -1e20, 0.0):
        x = torch.full((1, 6, 64), value)
        assert torch.allclose(rounding(x), x, rtol=1e-6, atol=0), value


@pytest.mark.parametrize(
    ("rounding", "levels"), [(row[0], row[2]) for row in ROUNDINGS.values()], ids=ROUNDINGS
)
def test_rounding_leaves_no_more_values_than_eight_bits_hold(
    rounding: Callable[[Tensor], Tensor], levels: int
) -> None:
    x = torch.linspace(-1, 1, 32 * 400).reshape(1, 400, 32)[:, torch.randperm(400)]
    x[..., 0], x[..., 1] = -1, 1  # every block and row has the whole range
    found = len(rounding(x).unique())
    assert 200 < found <= levels


def test_a_row_is_rounded_without_regard_to_the_others() -> None:
    x = normal(1, 6, 64)
    louder = x.clone()
    louder[:, 3:] *= 1000
    assert torch.equal(round_rows_to_int8(louder)[:, :3], round_rows_to_int8(x)[:, :3])


def test_a_block_is_rounded_without_regard_to_the_others() -> None:
    x = normal(1, 6, 64)
    louder = x.clone()
    louder[..., 32:] *= 1000
    assert torch.equal(
        round_blocks_to_int8(louder, 32)[..., :32], round_blocks_to_int8(x, 32)[..., :32]
    )


def test_a_width_that_the_block_does_not_divide_is_one_block() -> None:
    x = normal(1, 6, 48)
    assert torch.equal(round_blocks_to_int8(x, 32), round_blocks_to_int8(x, 48))


def test_the_prompt_shares_one_range_and_later_rows_have_their_own() -> None:
    x = normal(1, 6, 64)
    x[:, 2, 0], x[:, 5, 0] = 1000, 1000
    rounded = round_prompt_to_int8(x, 4, 8)
    assert (rounded[:, 0] - x[:, 0]).abs().max() > 0.1, "row 0 suffers from row 2"
    assert (rounded[:, 4] - x[:, 4]).abs().max() < 0.1, "row 4 does not suffer from row 5"


def test_each_chunk_of_a_prompt_has_a_range_of_its_own() -> None:
    x = normal(1, 6, 64)
    chunks = [round_prompt_to_int8(part, 4, 8) for part in (x[:, :2], x[:, 2:4])]
    whole = round_prompt_to_int8(x, 4, 2)
    assert torch.equal(whole[:, :4], torch.cat(chunks, 1))
    assert not torch.equal(whole, round_prompt_to_int8(x, 4, 8))


@pytest.mark.parametrize("prompt", [0, 6, 9])
def test_a_text_of_prompt_or_of_later_rows_only_is_rounded(prompt: int) -> None:
    x = normal(1, 6, 64)
    rows = round_rows_to_int8(x) if prompt == 0 else round_rows_to_int8(x.flatten(1)).view_as(x)
    assert torch.equal(round_prompt_to_int8(x, prompt, 8), rows)


def test_score_rounds_the_input_of_every_matrix_product(nano: Path) -> None:
    checkpoint, seen = open_checkpoint(nano), list[tuple[int, ...]]()

    def count(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape[-1:]))
        return x

    plain = score(checkpoint, [1, 2, 3], [2], None)
    assert torch.equal(score(checkpoint, [1, 2, 3], [2], count), plain)
    # q, k, v, o, gate, up, down in each of the six layers, and the output layer.
    assert len(seen) == 7 * 6 + 1
    assert seen.count((512,)) == 6


def test_rounding_moves_the_logits_a_little(nano: Path) -> None:
    checkpoint, tokens = open_checkpoint(nano), tokens_of(12)
    plain = score(checkpoint, tokens, range(12), None)
    rounded = score(checkpoint, tokens, range(12), round_rows_to_int8)
    difference = (rounded - plain).abs().max()
    assert 1e-4 < difference < 0.2 * plain.std() * 10
