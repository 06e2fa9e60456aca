"""The text of a calibration: mixtures, what is held out, files, and text the checkpoint writes."""

import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from calibrating import BEGIN, END, quantize_here, recipe_of, small_checkpoint
from commands import contents
from conftest import FAMILIES, TEXT, MakeCheckpoint

from exporter.calibration.cache import cache_lock
from exporter.calibration.data import CalibrationText, SourceText, read_text
from exporter.calibration.self_generation import continue_texts, written_text
from exporter.calibration.settings import Calibration, Source
from exporter.errors import InputError
from exporter.files import sha256
from exporter.inference.reference import ReferenceRunner
from exporter.inference.sampling import draw, sample
from exporter.model.checkpoint import Checkpoint
from exporter.model.decoder import load_decoder
from exporter.text.tokenizer import load_tokenizer

END_ID = 1
Text = list[list[int]]


def numbered(name: str, weight: float, count: int, held_out: int = 2) -> SourceText:
    """A source whose sequences can be told apart: [source, number]."""
    rows = torch.tensor([[ord(name), number] for number in range(count + held_out)])
    return SourceText(name, "hash", weight, rows[:count], rows[count:])


def mixed(*sources: SourceText, seed: int = 0, count: int = 120) -> Text:
    rows: Text = CalibrationText(sources, seed).train(count).tolist()
    return rows


# Mixtures.


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (5, 2, 1), (0.2, 0.1)])
def test_at_every_length_the_shares_of_a_mixture_follow_the_weights(
    weights: tuple[float, ...],
) -> None:
    sources = [numbered(chr(65 + i), weight, 10) for i, weight in enumerate(weights)]
    rows = mixed(*sources)
    for length in range(1, len(rows) + 1):
        counts = Counter(row[0] for row in rows[:length])
        for index, weight in enumerate(weights):
            share = length * weight / sum(weights)
            assert abs(counts[65 + index] - share) < len(weights), (length, index)
    assert Counter(row[0] for row in rows)[65] == round(120 * weights[0] / sum(weights))


def test_a_source_is_used_up_before_any_of_it_comes_again() -> None:
    rows = mixed(numbered("A", 3, 10), numbered("B", 1, 7))
    for name, size in (("A", 10), ("B", 7)):
        numbers = [number for source, number in rows if source == ord(name)]
        for start in range(0, len(numbers) - size + 1, size):
            assert sorted(numbers[start : start + size]) == list(range(size))
        assert numbers[:size] != numbers[size : 2 * size]  # shuffled anew


def test_nothing_that_is_held_out_is_ever_learned_from() -> None:
    text = CalibrationText((numbered("A", 3, 10, 3), numbered("B", 1, 7, 5)), 0)
    learned, held_out = text.train(300).tolist(), text.held_out(8).tolist()
    assert [row for row in held_out if row in learned] == []
    assert [row[0] for row in held_out] == [65] * 3 + [66] * 4


def test_some_of_each_source_is_held_out_however_few_are_asked_for() -> None:
    text = CalibrationText((numbered("A", 3, 10), numbered("B", 1, 7)), 0)
    assert [row[0] for row in text.held_out(1).tolist()] == [65, 66]


def test_a_longer_text_begins_with_the_shorter_one() -> None:
    """A run that goes on, or that has more steps, sees the same text."""
    sources = numbered("A", 3, 10), numbered("B", 1, 7)
    assert mixed(*sources, count=120)[:50] == mixed(*sources, count=50)


def test_the_seed_decides_the_order() -> None:
    source = numbered("A", 1, 30)
    assert mixed(source, seed=1) == mixed(source, seed=1) != mixed(source, seed=2)


# Files.

CHAT = [{"role": "user", "content": f"How many {n}?"} for n in range(12)]


def write_parquet(path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"story": TEXT.splitlines(True)}), path)


def write_chats(path: Path) -> None:
    rows = [{"messages": [turn, {"role": "assistant", "content": "a dozen"}]} for turn in CHAT]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


FILES: dict[str, tuple[str, Any, str, list[str]]] = {
    "plain text": ("a.txt", lambda path: path.write_text(TEXT), "", ["Ada has 0 eggs"]),
    "conversations": ("a.jsonl", write_chats, "", ["[user]How many 0?<end>[assistant]a dozen"]),
    "parquet": ("a.parquet", write_parquet, "story", ["Ada has 0 eggs", "Ada has 1 eggs"]),
    "a field": (
        "a.jsonl",
        lambda path: path.write_text(json.dumps({"other": "x", "body": TEXT}) + "\n"),
        "body",
        ["Ada has 0 eggs"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_a_file_becomes_sequences_of_its_tokens(
    kind: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint, (name, write, field, said) = small_checkpoint(make_checkpoint), FILES[kind]
    write(tmp_path / name)
    source = Source(path=str(tmp_path / name), field=field, weight=2.5)
    [found] = read_text(
        checkpoint, Calibration(data=(source,), sequence_length=24, held_out=0.25), []
    ).sources
    assert found.train.shape[1] == found.held_out.shape[1] == 24
    total = len(found.train) + len(found.held_out)
    assert len(found.held_out) == round(total / 4)
    whole = torch.cat((found.train, found.held_out))
    assert (whole[:, 0] == 0).all()  # each sequence begins a text
    text = load_tokenizer(checkpoint.path).decode_whole(whole[:, 1:].flatten().tolist())
    assert [part for part in said if part not in text.replace(BEGIN, "")] == []
    assert (found.name, found.sha256, found.weight) == (name, sha256(tmp_path / name), 2.5)


def test_a_model_of_fewer_tokens_than_its_tokenizer_is_refused(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = small_checkpoint(make_checkpoint, vocab_size=64)
    (tmp_path / "a.txt").write_text(TEXT)
    with pytest.raises(InputError, match=r"outside of the model's vocabulary.*does not belong"):
        read_text(
            checkpoint,
            Calibration(data=(Source(path=str(tmp_path / "a.txt")),), sequence_length=24),
            [],
        )


def test_the_manifest_has_the_hash_and_the_share_of_every_source(
    make_checkpoint: MakeCheckpoint, own_cache: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    data = [{"path": str(tmp_path / "a.txt"), "weight": 3.0}, {"tokens": 400}]
    checkpoint = small_checkpoint(make_checkpoint)
    quantized = quantize_here(recipe_of("gptq", data), checkpoint, tmp_path / "out")
    [written] = own_cache.glob("*.jsonl")
    assert quantized.manifest["calibration"]["text"] == [
        {"source": "a.txt", "sha256": sha256(tmp_path / "a.txt"), "weight": 3.0},
        {"source": "self-generated", "sha256": sha256(written), "weight": 1.0},
    ]


# Text that the checkpoint writes.

SHORT = Source(tokens=600)


def write(
    checkpoint: Checkpoint, source: Source = SHORT, seed: int = 0, steps: list[str] | None = None
) -> tuple[Path, list[str]]:
    """The file, and the steps that were shown while it was written."""
    shown = list[str]() if steps is None else steps
    calibration = Calibration(data=(source,), sequence_length=48, seed=seed)
    path = written_text(
        checkpoint, source, calibration, torch.float32, "this one",
        lambda done, total, note: shown.append(f"{done} of {total} {note}".strip()),
    )  # fmt: skip
    return path, shown


def texts_of(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_written_text_is_kept_and_used_again(
    make_checkpoint: MakeCheckpoint, own_cache: Path
) -> None:
    checkpoint = small_checkpoint(make_checkpoint)
    path, steps = write(checkpoint)
    assert path.parent == own_cache
    assert steps[0] == "0 of 600" and steps[-1] == "600 of 600"
    moment, before = path.stat().st_mtime_ns, contents(own_cache)
    assert write(checkpoint) == (path, [])
    assert (path.stat().st_mtime_ns, contents(own_cache)) == (moment, before)


@pytest.mark.parametrize("made", [True, False], ids=["made", "killed"])
def test_of_two_runs_that_want_the_same_text_one_waits_and_writes_it_only_if_the_other_did_not(
    made: bool, make_checkpoint: MakeCheckpoint
) -> None:
    checkpoint, said = small_checkpoint(make_checkpoint), list[str]()
    path, steps = write(checkpoint)
    content = path.read_bytes()
    path.unlink()
    with ThreadPoolExecutor(1) as pool, cache_lock(path):
        waiting = pool.submit(write, checkpoint, steps=said)
        while not said:
            assert not waiting.done()
            time.sleep(0.01)
        if made:
            path.write_bytes(content)
    assert waiting.result()[0].read_bytes() == content
    assert said[:2] == ["0 of 1 waits for another run that makes it", "1 of 1"]
    assert said[2:] == ([] if made else steps)
    assert {place.name for place in path.parent.iterdir()} == {path.name, f".{path.name}.lock"}


def test_one_run_at_a_time_holds_the_lock_of_a_cached_result(tmp_path: Path) -> None:
    inside, most = list[int](), list[int]()

    def hold(number: int) -> None:
        with cache_lock(tmp_path / "answers"):
            inside.append(number)
            time.sleep(0.002)
            most.append(len(inside))
            inside.remove(number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(hold, range(40)))
    assert most == [1] * 40


def test_a_finished_cache_may_be_read_only(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = small_checkpoint(make_checkpoint)
    path, _ = write(checkpoint)
    path.parent.chmod(0o555)
    try:
        moment = path.parent.stat().st_mtime_ns
        assert write(checkpoint) == (path, [])
        assert path.parent.stat().st_mtime_ns == moment  # not even a lock file was made
    finally:
        path.parent.chmod(0o755)


def test_written_text_is_of_the_wanted_length_and_of_the_model_s_tokens(
    make_checkpoint: MakeCheckpoint,
) -> None:
    checkpoint = small_checkpoint(make_checkpoint)
    tokenizer = load_tokenizer(checkpoint.path)
    encoded = [tokenizer.encode(text) for text in texts_of(write(checkpoint)[0])]
    assert 600 <= sum(map(len, encoded)) < 600 + 128 * 48
    for ids in encoded:
        assert ids[0] == 0 and len(ids) <= 48 and max(ids) < 96
        # An end, if there is one, is the last token; without one the context was full.
        assert [i for i in ids[:-1] if i in (1, 2)] == []
        assert ids[-1] in (1, 2) or len(ids) == 48
    assert any(ids[-1] in (1, 2) for ids in encoded)
    assert any(len(ids) == 48 for ids in encoded)


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"source": Source(tokens=601)}, {"source": Source(tokens=600, temperature=0.5)}],
    ids=["seed", "tokens", "temperature"],
)
def test_other_settings_write_other_text(
    change: dict[str, Any], make_checkpoint: MakeCheckpoint
) -> None:
    checkpoint = small_checkpoint(make_checkpoint)
    one, other = write(checkpoint)[0], write(checkpoint, **change)[0]
    assert one != other
    if "tokens=601" not in str(change):
        assert texts_of(one) != texts_of(other)


def test_the_same_settings_write_the_same_text_in_another_cache(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    checkpoint = small_checkpoint(make_checkpoint)
    one = write(checkpoint)[0]
    monkeypatch.setenv("MOBILELLM_CACHE", str(tmp_path / "another"))
    other = write(checkpoint)[0]
    assert one != other and one.name == other.name
    assert one.read_bytes() == other.read_bytes()


def test_a_model_without_a_begin_of_text_starts_with_any_token(
    make_checkpoint: MakeCheckpoint,
) -> None:
    checkpoint = replace(small_checkpoint(make_checkpoint), bos_token_id=None)
    tokenizer = load_tokenizer(checkpoint.path)
    assert len({tokenizer.encode(text)[0] for text in texts_of(write(checkpoint)[0])}) > 5


PROMPTS: dict[str, tuple[str, str, str]] = {
    "lines": ("p.txt", "How many?\n\nWhy?\n", ""),
    "prompt": ("p.jsonl", '{"prompt": "How many?"}\n{"prompt": "Why?"}\n', ""),
    "question": ("p.jsonl", '{"question": "How many?"}\n{"question": "Why?", "x": 1}\n', ""),
    "field": ("p.jsonl", '{"ask": "How many?"}\n{"ask": "Why?"}\n', "ask"),
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_the_prompts_of_a_file_are_answered_in_turn(
    kind: str, make_checkpoint: MakeCheckpoint, own_cache: Path, tmp_path: Path
) -> None:
    """As a whole recipe, so that what is checked before and what is read after agree."""
    name, content, field = PROMPTS[kind]
    (tmp_path / name).write_text(content)
    data = [{"prompts": str(tmp_path / name), "field": field, "tokens": 600}]
    checkpoint = small_checkpoint(make_checkpoint)
    recipe = recipe_of("gptq", data, sequence_length=48)
    quantize_here(recipe, checkpoint, tmp_path / "out")
    [path] = own_cache.glob("*.jsonl")
    texts = texts_of(path)
    for index, text in enumerate(texts):
        asked = ("How many?", "Why?")[index % 2]
        assert text.startswith(f"{BEGIN}[user]{asked}{END}[assistant]")
    assert len(set(texts)) > 2


def test_other_prompts_write_other_text(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint, prompts = small_checkpoint(make_checkpoint), tmp_path / "p.txt"
    prompts.write_text("How many?")
    one, _ = write(checkpoint, Source(prompts=str(prompts), tokens=600))
    prompts.write_text("Why?")
    other, _ = write(checkpoint, Source(prompts=str(prompts), tokens=600))
    assert one != other


def test_texts_are_gone_on_with_after_their_first_tokens_and_as_they_are(
    make_checkpoint: MakeCheckpoint, own_cache: Path, tmp_path: Path
) -> None:
    (tmp_path / "p.txt").write_text("How many eggs?\nNo\nWhy are there so many?\n")
    checkpoint = small_checkpoint(make_checkpoint)
    tokenizer = load_tokenizer(checkpoint.path)
    first = [tokenizer.encode(text)[:5] for text in ("How many eggs?", "Why are there so many?")]
    data = [{"prompts": str(tmp_path / "p.txt"), "continue_after": 5, "tokens": 600}]
    recipe = recipe_of("gptq", data, sequence_length=48)
    quantize_here(recipe, checkpoint, tmp_path / "out")
    [path] = own_cache.glob("*.jsonl")
    written = [tokenizer.encode(text) for text in texts_of(path)]
    assert [ids[:6] for ids in written] == [[0, *first[i % 2]] for i in range(len(written))]
    assert len(set(map(tuple, written))) > 2


def test_tokens_are_drawn_as_often_as_their_share_says() -> None:
    shares = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0]).repeat(20_000, 1)
    drawn = draw(shares, torch.Generator().manual_seed(0))
    found = torch.bincount(drawn[:, 0], minlength=6) / len(shares)
    assert (found - shares[0]).abs().max() < 0.015  # four standard deviations
    assert found[[0, 2, 5]].sum() == 0


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (1.0, 1.0, [59, 26, 364, 56, 209, 121, 211, 292]),
        (0.7, 0.9, [393, 26, 448, 244, 180, 448, 48, 238]),
    ],
)
def test_a_seed_gives_the_tokens_that_it_always_gave(
    temperature: float, top_p: float, expected: list[int]
) -> None:
    """Or texts in the cache, and results that were made with them, could not be made again."""
    logits = 3 * torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    found = sample(logits, temperature, top_p, torch.Generator().manual_seed(1))
    assert found[:8] == expected


@pytest.mark.parametrize(
    ("content", "continue_after", "problem"),
    [
        ("How many? " * 10, 0, "has no prompt of less than 48 tokens"),
        ("Why?\n" * 10, 40, "has no text of 40 tokens, after which it could go on"),
    ],
    ids=["prompts too long", "texts too short to go on with"],
)
def test_prompts_of_which_none_fits_are_refused(
    content: str,
    continue_after: int,
    problem: str,
    make_checkpoint: MakeCheckpoint,
    own_cache: Path,
    tmp_path: Path,
) -> None:
    checkpoint, prompts = small_checkpoint(make_checkpoint), tmp_path / "p.txt"
    prompts.write_text(content)
    with pytest.raises(InputError, match=problem):
        write(checkpoint, Source(prompts=str(prompts), continue_after=continue_after, tokens=600))
    assert list(own_cache.glob("*.jsonl")) == []


@pytest.mark.parametrize("base", FAMILIES.values(), ids=FAMILIES)
def test_texts_that_are_written_together_are_those_of_a_runner_on_its_own(
    base: dict[str, Any], make_checkpoint: MakeCheckpoint
) -> None:
    checkpoint = small_checkpoint(make_checkpoint, base)
    generator = torch.Generator().manual_seed(5)
    prompts = [
        torch.randint(3, 96, (length,), generator=generator).tolist()
        for length in (1, 2, 5, 9, 17, 30, 39)
    ]
    ends, source = set(checkpoint.eos_token_ids), Source(temperature=1e-6)
    found = continue_texts(load_decoder(checkpoint, 40), prompts, ends, source, generator)
    runner = ReferenceRunner(checkpoint, 40)
    for prompt, text in zip(prompts, found, strict=True):
        expected, logits = list(prompt), runner.prefill(prompt)
        while True:
            expected.append(int(logits.argmax()))
            if expected[-1] in ends or len(expected) == 40:
                break
            logits = runner.decode(expected[-1])
        assert text == expected


def test_top_p_leaves_only_the_likeliest_tokens(make_checkpoint: MakeCheckpoint) -> None:
    """So small a share is one token, at any temperature."""
    decoder = load_decoder(small_checkpoint(make_checkpoint), 24)
    prompts = [[5], [6, 7]]
    greedy, narrow, free = (
        continue_texts(decoder, prompts, set(), source, torch.Generator().manual_seed(1))
        for source in (Source(temperature=1e-6), Source(top_p=1e-6), Source())
    )
    assert greedy == narrow != free
