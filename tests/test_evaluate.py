"""The figures of `mobilellm evaluate` against transformers and by hand, in every runtime."""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrating import write_tokenizer
from commands import run
from conftest import LLAMA4, NANO, TEXT, MakeCheckpoint, random_weights
from torch import Tensor
from transformers import AutoModelForCausalLM

from exporter.backends import Runner, backend
from exporter.bundle.bundle import Bundle
from exporter.errors import InputError
from exporter.evaluation.generations import Written, compare_texts, write_texts
from exporter.evaluation.perplexity import bands, next_logits, score_text
from exporter.evaluation.tasks import find_answer, plain_answer, read_problems, score_problems
from exporter.inference.artifact_runner import ArtifactRunner
from exporter.inference.loaded_model import LoadedModel, open_model
from exporter.inference.reference import ReferenceRunner, score
from exporter.model.checkpoint import open_checkpoint
from exporter.progress import no_step
from exporter.quantization.activations import round_rows_to_int8
from exporter.text.sequences import cut_sequences
from exporter.text.tokenizer import TextTokenizer, load_tokenizer
from exporter.verification.runs import SAMPLE_TEXT

Capture = pytest.CaptureFixture[str]
FIGURES = {"perplexity", "kl", "top1_agreement", "accuracy", "tokens"}


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return load_tokenizer(NANO)


@pytest.fixture(scope="module")
def sequences(tokenizer: TextTokenizer) -> list[list[int]]:
    """Two sequences of 150 tokens: more than one chunk of logits each."""
    return cut_sequences([SAMPLE_TEXT.read_text() * 9], tokenizer, 0, 150, 300)


@pytest.fixture(scope="module")
def checkpoint() -> ReferenceRunner:
    return ReferenceRunner(open_checkpoint(NANO), 256)


class OneByOne:
    """The torch reference as an artifact is seen: only `prefill` and `decode`."""

    def __init__(self, runner: ReferenceRunner) -> None:
        self._runner, self.prefills = runner, list[int]()
        self.context, self.vocab_size = runner.context, runner.vocab_size

    def prefill(self, tokens: list[int]) -> Tensor:
        self.prefills.append(len(tokens))
        return self._runner.prefill(tokens)

    def decode(self, token: int) -> Tensor:
        return self._runner.decode(token)


class Fixed:
    """A runner with the same logits everywhere."""

    context = 256

    def __init__(self, logits: Sequence[float]) -> None:
        self._logits, self.vocab_size = torch.tensor(logits), len(logits)

    def prefill(self, tokens: list[int]) -> Tensor:
        return self._logits

    def decode(self, token: int) -> Tensor:
        return self._logits


# How text is cut.


def test_documents_follow_each_other_with_the_begin_token_between_and_before(
    tokenizer: TextTokenizer,
) -> None:
    texts = ["Ada has 12 eggs.", "Ben finds 7 more of them and counts them all again."]
    one, other = map(tokenizer.encode, texts)
    length = len(one) + 3
    assert cut_sequences(texts, tokenizer, 0, length, 2 * length) == [
        [0, *one, 0, other[0]],
        [0, *other[1:length]],
    ]


def test_a_begin_token_between_documents_is_not_repeated_at_the_start_of_a_sequence(
    tokenizer: TextTokenizer,
) -> None:
    one = tokenizer.encode("Ada has 12 eggs.")
    texts = ["Ada has 12 eggs."] * 3
    assert cut_sequences(texts, tokenizer, 0, len(one) + 1, 1000) == [[0, *one]] * 3


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_lost_or_read_twice_between_the_sequences(
    seed: int, tokenizer: TextTokenizer
) -> None:
    rng = random.Random(seed)
    texts = ["eggs " * rng.randint(1, 30) for _ in range(10)]
    length = rng.randint(3, 20)
    without = cut_sequences(texts, tokenizer, None, length, 10**6)
    stream = [token for text in texts for token in tokenizer.encode(text)]
    assert [token for one in without for token in one] == stream[: len(stream) // length * length]
    begun = cut_sequences(texts, tokenizer, 0, length, 10**6)
    content = [token for one in begun for token in one if token != 0]
    assert content == stream[: len(content)]
    assert len(stream) - len(content) < length
    assert {(one[0], one[1] != 0, len(one)) for one in begun} == {(0, True, length)}


def test_a_begin_token_that_the_text_writes_itself_stands_there_once(
    tokenizer: TextTokenizer,
) -> None:
    plain = cut_sequences(["Ada has 12 eggs."], tokenizer, 0, 6, 6)
    assert cut_sequences(["<|begin_of_text|>Ada has 12 eggs."], tokenizer, 0, 6, 6) == plain


def test_no_more_sequences_are_cut_than_asked_for(tokenizer: TextTokenizer) -> None:
    assert len(cut_sequences(["eggs " * 100], tokenizer, 0, 10, 39)) == 3


def test_too_little_text_is_refused(tokenizer: TextTokenizer) -> None:
    texts = ["Ada has", " 12"]
    count = 2 + sum(len(tokenizer.encode(text)) for text in texts)
    with pytest.raises(InputError, match=f"gives {count} tokens, less than one sequence of 20"):
        cut_sequences(texts, tokenizer, 0, 20, 20)


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, [(0, 1)]),
        (16, [(0, 16)]),
        (17, [(0, 16), (16, 17)]),
        (100, [(0, 16), (16, 32), (32, 64), (64, 100)]),
    ],
)
def test_positions_are_put_together_in_bands_that_grow(
    count: int, expected: list[tuple[int, int]]
) -> None:
    assert bands(count) == expected


# Perplexity and KL.


def test_perplexity_is_that_of_transformers(
    checkpoint: ReferenceRunner, sequences: list[list[int]]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(NANO, dtype=torch.float32)
    tokens = torch.tensor(sequences)
    with torch.inference_mode():
        loss = model(tokens, labels=tokens).loss.item()
    found = score_text(checkpoint, sequences, no_step)
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    assert (found.tokens, found.sequences) == (298, 2)
    assert (found.kl, found.top1_agreement, found.reference_perplexity) == (None, None, None)


def test_kl_and_agreement_are_those_worked_out_by_hand(
    checkpoint: ReferenceRunner, sequences: list[list[int]], finished_bundle: Bundle
) -> None:
    quantized = ReferenceRunner(finished_bundle.quantized, 256)
    found = score_text(quantized, sequences[:1], no_step, checkpoint)
    tokens = sequences[0]
    positions = range(len(tokens) - 1)
    theirs = score(open_checkpoint(NANO), tokens, positions).double().softmax(-1)
    ours = score(finished_bundle.quantized, tokens, positions).double().softmax(-1)
    kl = [
        sum(p * math.log(p / q) for p, q in zip(a, b, strict=True) if p > 0)
        for a, b in zip(theirs.tolist(), ours.tolist(), strict=True)
    ]
    loss = [-math.log(row[token]) for row, token in zip(ours.tolist(), tokens[1:], strict=True)]
    same = [max(range(512), key=a.__getitem__) == max(range(512), key=b.__getitem__)
            for a, b in zip(theirs.tolist(), ours.tolist(), strict=True)]  # fmt: skip
    assert found.kl == pytest.approx(sum(kl) / len(kl), rel=1e-4)
    assert found.top1_agreement == sum(same) / len(same)
    assert found.perplexity == pytest.approx(math.exp(sum(loss) / len(loss)), rel=1e-5)
    band = found.agreement_by_position[2]
    assert (band.first, band.last) == (32, 63)
    assert band.kl == pytest.approx(sum(kl[32:64]) / 32, rel=1e-4)
    assert band.perplexity == pytest.approx(math.exp(sum(loss[32:64]) / 32), rel=1e-5)
    assert band.top1_agreement == sum(same[32:64]) / 32


def test_a_model_agrees_with_itself(
    checkpoint: ReferenceRunner, sequences: list[list[int]]
) -> None:
    found = score_text(checkpoint, sequences, no_step, checkpoint)
    assert (found.kl, found.top1_agreement) == (0, 1)
    assert found.reference_perplexity == found.perplexity


def test_the_standard_error_is_that_of_the_mean_loss() -> None:
    """Losses log 2 and log 4 in equal number: a deviation of log(2) / 2 from their mean."""
    logits = torch.tensor([0.5, 0.25, 0.25]).log().tolist()
    found = score_text(Fixed(logits), [[0, 0, 1, 0, 1], [0, 1, 0, 2, 0]], no_step)
    assert found.perplexity == pytest.approx(math.sqrt(8))
    assert found.perplexity_error == pytest.approx(math.sqrt(8) * math.log(2) / 2 / math.sqrt(8))


@pytest.mark.parametrize("prefill", [1, 2, 64, 65, 149])
def test_a_model_that_is_read_token_by_token_gets_the_same_figures(
    prefill: int, checkpoint: ReferenceRunner, sequences: list[list[int]]
) -> None:
    """Around the size of a chunk of logits, 64."""
    runner = OneByOne(checkpoint)
    slow = score_text(runner, sequences, no_step, prefill=prefill)
    fast = score_text(checkpoint, sequences, no_step, prefill=prefill)
    assert slow.perplexity == pytest.approx(fast.perplexity, rel=1e-4)
    assert slow.tokens == fast.tokens == 2 * (150 - prefill)
    assert runner.prefills == [prefill, prefill]
    edges = [(band.first, band.last) for band in fast.agreement_by_position]
    assert (edges[0][0], edges[-1][1]) == (prefill - 1, 148)


@pytest.mark.parametrize("rows", [1, 7, 149, 1000])
def test_chunks_of_logits_are_those_of_the_whole_text(
    rows: int, checkpoint: ReferenceRunner, sequences: list[list[int]]
) -> None:
    tokens = sequences[0]
    expected = score(open_checkpoint(NANO), tokens, range(9, 150))
    for runner in (checkpoint, OneByOne(checkpoint)):
        chunks = list(next_logits(runner, tokens, 10, rows))
        assert max(map(len, chunks)) <= rows
        torch.testing.assert_close(torch.cat(chunks), expected, atol=1e-3, rtol=0)


def test_an_infinite_perplexity_is_no_number_of_json(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: Capture
) -> None:
    weights = random_weights(LLAMA4, torch.bfloat16)
    weights["model.norm.weight"] *= 1e6
    folder, text = make_checkpoint(LLAMA4, weights=weights), tmp_path / "text.txt"
    write_tokenizer(folder)
    text.write_text(TEXT)
    outcome = run(capsys, "evaluate", folder, "--data", text, "--sequence-length", 32, "--json")
    assert outcome.code == 0, outcome.err
    assert (outcome.json["perplexity"], outcome.json["tokens"] > 0) == (None, True)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_refused(bad: float) -> None:
    with pytest.raises(InputError, match="the model's logits at position 0 are not finite"):
        score_text(Fixed([0.0, bad]), [[0, 0, 1]], no_step)
    with pytest.raises(InputError, match="the reference's logits at position 0"):
        score_text(Fixed([0.0, 1.0]), [[0, 0, 1]], no_step, Fixed([0.0, bad]))


def test_a_hopeless_model_has_an_infinite_perplexity() -> None:
    assert score_text(Fixed([0.0, 1e4]), [[0, 0, 0]], no_step).perplexity == math.inf


# Every kind of model.


def test_simulated_rounding_is_that_of_the_verification(
    finished_bundle: Bundle, sequences: list[list[int]]
) -> None:
    tokens = sequences[0]
    runner = ReferenceRunner(finished_bundle.quantized, 256, round_rows_to_int8)
    found = torch.cat(list(runner.score(tokens, 0, 64)))
    expected = score(finished_bundle.quantized, tokens, range(150), round_rows_to_int8)
    plain = score(finished_bundle.quantized, tokens, range(150))
    assert (found - expected).abs().mean() < 0.1 * (found - plain).abs().mean()
    steps = torch.stack([runner.prefill(tokens[:1]), *map(runner.decode, tokens[1:])])
    assert (steps - expected).abs().mean() < 0.5 * (steps - plain).abs().mean()


@pytest.mark.parametrize("prefill", [1, 40])
@pytest.mark.parametrize("target", ["executorch", "onnx", "coreml"])
def test_an_artifact_is_as_far_from_its_quantized_checkpoint_as_its_rounding_says(
    target: str, prefill: int, finished_bundle: Bundle, sequences: list[list[int]]
) -> None:
    """No more than twice as far, as `verify` demands; and a runtime that rounds is not nearer
    than a tenth: then the rounding that explains it would be another."""
    artifact = finished_bundle.artifacts[target].artifact
    quantized = ReferenceRunner(finished_bundle.quantized, 256)
    parts = [tokens[:100] for tokens in sequences]
    rounding = backend(target).rounding(finished_bundle.quantized.schemes, artifact.target, prefill)
    simulated = ReferenceRunner(finished_bundle.quantized, 256, rounding)
    expected = score_text(simulated, parts, no_step, quantized, prefill)
    found = score_text(backend(target).load(artifact), parts, no_step, quantized, prefill)
    assert found.kl is not None and expected.kl is not None
    assert 0.1 * expected.kl < found.kl < 2 * expected.kl + 1e-4
    assert found.perplexity == pytest.approx(expected.perplexity, rel=0.1)


def paths(bundle: Bundle) -> dict[str, tuple[list[str], str]]:
    """Arguments of every kind of PATH → what runs it."""
    folder = bundle.path
    return {
        "checkpoint": ([str(NANO)], "checkpoint in torch"),
        "quantized": ([str(folder / "quantized")], "quantized checkpoint in torch"),
        "bundle": ([str(folder)], "executorch"),
        "target": ([str(folder), "--target", "coreml"], "coreml, interpreted"),
        "simulated": ([str(folder), "--target", "onnx", "--simulate"], "onnx simulated in torch"),
        "folder": ([str(folder / "onnx")], "onnx"),
        "pte": ([str(folder / "executorch" / "model.pte")], "executorch"),
        "onnx": ([str(folder / "onnx" / "onnx" / "model_q4.onnx")], "onnx"),
        "mlpackage": ([str(folder / "coreml" / "model.mlpackage")], "coreml, interpreted"),
    }


KINDS = "checkpoint quantized checkpoint bundle target simulated folder pte onnx mlpackage".split()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_path_is_measured_on_the_same_tokens(
    kind: str, finished_bundle: Bundle, capsys: Capture
) -> None:
    arguments, runs_in = paths(finished_bundle)[kind]
    sized = ["--sequence-length", "32", "--max-tokens", "64"]
    outcome = run(
        capsys, "evaluate", *arguments, "--data", SAMPLE_TEXT, *sized, "--reference", NANO, "--json"
    )
    assert outcome.code == 0, outcome.err
    found = outcome.json
    assert found.keys() >= FIGURES
    assert (found["kind"], found["tokens"], found["accuracy"]) == (runs_in, 62, None)
    checkpoint = run(
        capsys, "evaluate", NANO, "--data", SAMPLE_TEXT, *sized, "--json"
    ).json  # fmt: skip
    assert found["reference_perplexity"] == pytest.approx(checkpoint["perplexity"], rel=1e-5)
    assert found["perplexity"] == pytest.approx(checkpoint["perplexity"], rel=0.5)
    assert found["kl"] == 0 if kind == "checkpoint" else 0 < found["kl"] < 0.5


# Answers.


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is \\boxed{42}.", "42"),
        ("\\boxed{1} no, \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed {7}", "7"),
        ("\\boxed{ 7 }", "7"),
        ("work\n#### 72", "72"),
        ("#### 72\nand more", "72"),
        ("#### 1 then \\boxed{2}", "2"),
        ("\\boxed{2} then #### 1", "1"),
        ("\\boxed{5} and \\boxed{6", "5"),
        ("\\boxed{5} and \\boxed{}", "5"),
        ("\\boxed{6", None),
        ("####", None),
        ("The answer is 42.", None),
        ("", None),
    ],
)
def test_the_answer_is_the_last_boxed_or_marked_one(text: str, answer: str | None) -> None:
    assert find_answer(text) == answer


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("72", "72", True),
        ("72", " 72.", True),
        ("72", "72.0", True),
        ("72", "$72", True),
        ("72", "\\$72", True),
        ("72", "$72$", True),
        ("1,000", "1000", True),
        ("1,234,567.50", "1234567.5", True),
        ("-5", "-5.0", True),
        ("0", "-0", True),
        ("100", "1E2", True),
        ("72", "73", False),
        ("72", "-72", False),
        ("1,23", "123", False),
        ("(1,000)", "(1000)", False),
        ("1" * 40, "1" * 39 + "2", False),
        ("1e999999999", "1e999999998", False),
        ("nan", "nan", True),
        ("blue", "Blue", False),
        ("x + 1", "x + 1", True),
        ("", "0", False),
    ],
)
def test_answers_are_equal_when_only_their_spelling_differs(
    one: str, other: str, same: bool
) -> None:
    assert (plain_answer(one) == plain_answer(other)) is same


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"prompt": "p", "answer": "72"}, "72"),
        ({"prompt": "p", "answer": 72}, "72"),
        ({"prompt": "p", "answer": 7.5}, "7.5"),
        ({"question": "p", "answer": "half of it\n#### 72"}, "72"),
        ({"prompt": "p", "answer": "so \\boxed{72}."}, "72"),
    ],
)
def test_a_row_of_a_task_has_its_answer_plain_or_worked_out(
    row: dict[str, Any], answer: str, tmp_path: Path
) -> None:
    (tmp_path / "task.jsonl").write_text(json.dumps(row) + "\n")
    (problem,) = read_problems(tmp_path / "task.jsonl")
    assert (problem.prompt, problem.answer) == ("p", answer)


def test_only_the_first_problems_are_read(tmp_path: Path) -> None:
    (tmp_path / "task.jsonl").write_text('{"prompt": "p", "answer": "1"}\n' * 3 + "not JSON\n")
    assert len(read_problems(tmp_path / "task.jsonl", 2)) == 2


def test_a_task_is_scored_by_answers_and_by_texts_that_never_end(
    tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    (tmp_path / "task.jsonl").write_text('{"prompt": "p", "answer": "7"}\n' * 4)
    written = [
        Written(tuple(tokenizer.encode("\\boxed{7}")), True),
        Written(tuple(tokenizer.encode("\\boxed{8}")), True),
        Written(tuple(tokenizer.encode("7")), True),
        Written(tuple(tokenizer.encode("\\boxed{7} \\boxed{7} \\boxed{7")), False),
    ]
    found = score_problems(read_problems(tmp_path / "task.jsonl"), written, tokenizer)
    assert (found.accuracy, found.answered, found.never_ended) == (0.5, 0.75, 0.25)
    assert [attempt.found for attempt in found.attempts] == ["7", "8", None, "7"]
    assert found.mean_tokens == sum(len(one.tokens) for one in written) / 4


# Generations.


def speaker_of(runner: Runner, ends: tuple[int, ...]) -> LoadedModel:
    return LoadedModel(runner, NANO, 0, ends, "test", open_checkpoint(NANO))


def test_a_text_that_never_ends_is_cut_off_and_counted() -> None:
    notes = list[str]()
    written = write_texts(
        speaker_of(Fixed([0.0, 1.0]), (0,)), [[0], [0, 0]], 5, lambda *step: notes.append(step[2])
    )
    assert written == [Written((1,) * 5, False)] * 2
    assert notes[-1] == "2 never ended"
    assert write_texts(speaker_of(Fixed([0.0, 1.0]), (1,)), [[0]], 5, no_step) == [
        Written((), True)
    ]


def test_a_text_ends_where_the_context_does() -> None:
    (written,) = write_texts(speaker_of(Fixed([0.0, 1.0]), (0,)), [[0] * 250], 1000, no_step)
    assert (len(written.tokens), written.ended) == (7, False)


@pytest.mark.parametrize(
    ("reference", "other", "place"),
    [
        (Written((1, 2, 3), True), Written((1, 2, 3), True), None),
        (Written((1, 2, 3), True), Written((1, 5, 3), True), 1),
        (Written((1, 2), True), Written((1, 2, 3), True), 2),
        (Written((1, 2, 3), False), Written((1, 2), True), 2),
        (Written((1, 2, 3), False), Written((1, 2), False), None),
        (Written((), True), Written((1,), False), 0),
    ],
)
def test_generations_part_where_a_token_or_the_end_differs(
    reference: Written, other: Written, place: int | None
) -> None:
    found = compare_texts([reference], [other])
    assert found.first_divergence == (place,)
    assert found.identical_generations == (place is None)


def test_generations_are_compared_position_by_position() -> None:
    reference = [Written((1,) * 20, False), Written((1,) * 10, True), Written((1,) * 20, False)]
    others = [
        Written((1,) * 20, False),
        Written((1,) * 10, True),
        Written((1,) * 4 + (2,) * 16, False),
    ]
    found = compare_texts(reference, others)
    assert found.first_divergence == (None, None, 4)
    assert found.median_first_divergence == 11  # of 20, 10 and the end, 4
    first, last = found.generation_agreement_by_position
    assert (first.first, first.last, first.agreement) == (0, 15, (16 + 11 + 4) / (16 + 11 + 16))
    assert (last.first, last.last, last.agreement) == (16, 19, 0.5)


@pytest.mark.parametrize("target", [None, "onnx"])
def test_a_task_with_generations_from_the_command_line(
    target: str | None, finished_bundle: Bundle, tmp_path: Path, capsys: Capture
) -> None:
    rows = [
        ("Ada has 12 eggs. Ada sells 5. Then 20 eggs are added. How many eggs does Ada have now?",
         "12 - 5 = 7\n#### 27"),
        ("Ben has 30 pens. Ben loses 10 of them. Ben finds 5 more. How many pens does Ben have "
         "now?", "25"),
        ("Ben has 30 pens. How many kites?", "no number"),
    ]  # fmt: skip
    lines = [json.dumps({"question": question, "answer": answer}) for question, answer in rows]
    (tmp_path / "task.jsonl").write_text("\n".join(lines))
    path = [finished_bundle.path, "--target", target] if target else [NANO]
    options = ["--reference", NANO, "--generations", "2", "--max-new-tokens", "80"]
    arguments = ["evaluate", *path, "--task", tmp_path / "task.jsonl", *options]
    outcome = run(capsys, *arguments, "--json")
    assert outcome.code == 0, outcome.err
    found = outcome.json
    assert found.keys() >= FIGURES
    assert (found["tokens"], found["problems"], found["generations"]) == (None, 3, 2)
    solved = [attempt["found"] == right for attempt, right in zip(
        found["attempts"], ["27", "25", "no number"], strict=True)]  # fmt: skip
    assert solved[0] and found["accuracy"] == sum(solved) / 3
    assert len(found["first_divergence"]) == 2
    if target is None:
        assert solved == [True, True, False]
        assert (found["identical_generations"], found["first_divergence"]) == (1, [None, None])
    shown = run(capsys, *arguments)
    assert shown.code == 0
    for text in (
        f"{sum(solved) / 3:.1%} of 3 problems",
        "never ended",
        "first divergence",
        "same token",
    ):
        assert text in shown.out
    assert "task" in shown.err and "reference" in shown.err


def test_the_table_shows_the_figures_and_how_they_change_along_the_text(
    finished_bundle: Bundle, capsys: Capture
) -> None:
    outcome = run(
        capsys, "evaluate", finished_bundle.path / "quantized", "--data", SAMPLE_TEXT,
        "--reference", NANO, "--sequence-length", "100", "--max-tokens", "200",
    )  # fmt: skip
    assert outcome.code == 0
    for text in ("perplexity", "top-1 agreement", "198 predictions in 2 sequences", "64–98"):
        assert text in outcome.out
    assert "text" in outcome.err


def test_the_checkpoint_solves_what_the_torch_reference_solves(tmp_path: Path) -> None:
    """open_model and its runner are those of `generate`."""
    model = open_model(str(NANO), None)
    prompt = load_tokenizer(NANO).encode(load_tokenizer(NANO).chat_text("What is 12 + 7?"))
    (written,) = write_texts(model, [prompt], 40, no_step)
    original = AutoModelForCausalLM.from_pretrained(NANO, dtype=torch.float32)
    theirs = original.generate(
        torch.tensor([prompt]), max_new_tokens=40, do_sample=False, pad_token_id=1
    )[0, len(prompt) :].tolist()
    assert written.ended is (theirs[-1] in model.eos_token_ids)
    assert list(written.tokens) == (theirs[:-1] if written.ended else theirs)


def test_an_artifact_in_its_child_process_gives_the_logits_of_its_runtime(
    finished_bundle: Bundle,
) -> None:
    artifact = finished_bundle.artifacts["onnx"].artifact
    here, there = backend("onnx").load(artifact), ArtifactRunner(artifact)
    assert (there.context, there.vocab_size) == (here.context, here.vocab_size)
    for _ in range(2):
        assert torch.equal(there.prefill([0, 5, 7]), here.prefill([0, 5, 7]))
        assert torch.equal(there.decode(9), here.decode(9))


def test_a_prompt_beyond_the_context_is_refused_and_the_artifact_goes_on(
    finished_bundle: Bundle,
) -> None:
    runner = ArtifactRunner(finished_bundle.artifacts["onnx"].artifact)
    with pytest.raises(InputError, match="1025 tokens do not fit into 1024"):
        runner.prefill([5] * 1025)
    assert runner.prefill([5]).shape == (512,)
