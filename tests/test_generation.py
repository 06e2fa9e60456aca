"""Generation from the torch reference: greedy, sampled, and where it stops."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import NANO
from torch import Tensor
from transformers import AutoModelForCausalLM

from exporter.errors import InputError
from exporter.inference.generation import Generation, Sampling
from exporter.inference.reference import ReferenceRunner
from exporter.model.checkpoint import open_checkpoint
from exporter.text.tokenizer import load_tokenizer

QUESTIONS = [
    "What is 12 + 7?",
    "Ada has 12 eggs. Ada finds 7 more. Ada sells 5. How many eggs does Ada have now?",
    "Grüße 🙂",
]


@pytest.fixture(scope="module")
def runner() -> ReferenceRunner:
    return ReferenceRunner(open_checkpoint(NANO), 256)


def prompt_of(question: str) -> list[int]:
    tokenizer = load_tokenizer(NANO)
    return tokenizer.encode(tokenizer.chat_text(question))


def generate(
    runner: ReferenceRunner, prompt: Sequence[int], end_ids: Sequence[int] = (), **options: float
) -> Generation:
    """A finished generation."""
    generation = Generation(runner, prompt, end_ids, Sampling(**options))  # type: ignore[arg-type]
    yielded = list(generation)
    assert yielded == generation.tokens
    return generation


class Scripted:
    """A runner whose likeliest tokens are given in advance; the others are half as likely."""

    def __init__(self, tokens: Sequence[int], context: int = 64, vocab_size: int = 10) -> None:
        self.tokens, self.context, self.vocab_size = list(tokens), context, vocab_size
        self.decoded = list[int]()
        self.prompt = list[int]()

    def prefill(self, tokens: list[int]) -> Tensor:
        self.prompt = tokens
        return self._logits()

    def decode(self, token: int) -> Tensor:
        self.decoded.append(token)
        return self._logits()

    def _logits(self) -> Tensor:
        place = len(self.decoded)
        assert len(self.prompt) + place <= self.context, "the cache is full"
        logits = torch.zeros(self.vocab_size)
        logits[self.tokens[place % len(self.tokens)]] = 0.6931472
        return logits


# Greedy.


@pytest.mark.parametrize("question", QUESTIONS)
def test_greedy_tokens_are_those_of_transformers(question: str, runner: ReferenceRunner) -> None:
    prompt = prompt_of(question)
    model = AutoModelForCausalLM.from_pretrained(NANO, dtype=torch.float32)
    theirs = model.generate(
        torch.tensor([prompt]), max_new_tokens=48, do_sample=False, pad_token_id=1
    )[0, len(prompt) :].tolist()
    ends = open_checkpoint(NANO).eos_token_ids
    ours = generate(runner, prompt, ends, max_new_tokens=48)
    expected = theirs[:-1] if theirs[-1] in ends else theirs
    assert len(expected) > 4
    assert ours.tokens == expected
    assert ours.finish_reason == ("stop" if theirs[-1] in ends else "length")


def test_greedy_takes_the_likeliest_token_every_time() -> None:
    scripted = Scripted([3, 1, 4, 1, 5])
    assert generate(scripted, [0], max_new_tokens=5).tokens == [3, 1, 4, 1, 5]


def test_greedy_does_not_depend_on_the_seed(runner: ReferenceRunner) -> None:
    prompt = prompt_of(QUESTIONS[0])
    one, other = (generate(runner, prompt, seed=seed, max_new_tokens=12) for seed in (1, 2))
    assert one.tokens == other.tokens


def test_a_second_generation_does_not_depend_on_the_first(runner: ReferenceRunner) -> None:
    prompt = prompt_of(QUESTIONS[0])
    alone = generate(runner, prompt, max_new_tokens=12).tokens
    generate(runner, prompt_of(QUESTIONS[1]), max_new_tokens=30)
    assert generate(runner, prompt, max_new_tokens=12).tokens == alone


# Sampling.


def sampled(runner: ReferenceRunner, **options: float) -> list[int]:
    options = {"temperature": 1.5, "max_new_tokens": 30, **options}
    return generate(runner, prompt_of("Tell me"), **options).tokens


def test_a_sample_repeats_with_its_seed(runner: ReferenceRunner) -> None:
    assert sampled(runner, seed=5) == sampled(runner, seed=5)


def test_samples_of_other_seeds_differ(runner: ReferenceRunner) -> None:
    samples = {tuple(sampled(runner, seed=seed)) for seed in range(5)}
    assert len(samples) == 5


def test_sampling_leaves_the_seed_of_torch_alone(runner: ReferenceRunner) -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    sampled(runner, seed=5)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("options", [{"top_p": 1e-9}, {"temperature": 1e-4}], ids=str)
def test_a_tiny_share_or_temperature_is_greedy(
    options: dict[str, float], runner: ReferenceRunner
) -> None:
    assert sampled(runner, **options) == sampled(runner, temperature=0)


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e300])
def test_the_smallest_and_largest_temperatures_still_give_tokens(temperature: float) -> None:
    options = {"temperature": temperature, "max_new_tokens": 3}
    tokens = generate(Scripted([3, 1, 4]), [0], **options).tokens
    assert len(tokens) == 3
    assert temperature > 1 or tokens == [3, 1, 4]


def test_tokens_are_sampled_in_the_shares_of_the_softmax() -> None:
    """Token 7 has twice the weight of each of the nine others: 2 of 11."""
    tokens = generate(Scripted([7], context=4000), [0], temperature=1, max_new_tokens=3900).tokens
    counts = torch.bincount(torch.tensor(tokens), minlength=10) / 3900
    assert counts[7].item() == pytest.approx(2 / 11, abs=0.02)
    for token in set(range(10)) - {7}:
        assert counts[token].item() == pytest.approx(1 / 11, abs=0.02)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(2 / 11 - 1e-6, 1), (2 / 11 + 1e-6, 2), (0.5, 5), (1.0, 10)]
)
def test_top_p_keeps_the_likeliest_tokens_that_make_up_the_share(top_p: float, kept: int) -> None:
    tokens = generate(
        Scripted([7], context=1000), [0], temperature=1, top_p=top_p, max_new_tokens=900
    ).tokens
    assert 7 in tokens
    assert len(set(tokens)) == kept


# Where it stops.


@pytest.mark.parametrize("ends", [[4], [9, 4]])
def test_generation_stops_at_an_end_token_and_leaves_it_out(ends: list[int]) -> None:
    generation = generate(Scripted([3, 1, 4, 1]), [0], ends)
    assert (generation.tokens, generation.finish_reason) == ([3, 1], "stop")


def test_an_end_token_at_once_gives_no_tokens() -> None:
    generation = generate(Scripted([4]), [0], [4])
    assert (generation.tokens, generation.finish_reason) == ([], "stop")


@pytest.mark.parametrize("count", [1, 2, 7])
def test_generation_stops_after_max_new_tokens(count: int) -> None:
    scripted = Scripted([3, 1, 4])
    generation = generate(scripted, [0], max_new_tokens=count)
    assert (len(generation.tokens), generation.finish_reason) == (count, "length")
    assert len(scripted.decoded) == count - 1, "no step is run whose token nobody asked for"


@pytest.mark.parametrize("length", [1, 5, 7])
def test_generation_stops_where_the_context_is_full(length: int) -> None:
    scripted = Scripted([3, 1, 4], context=8)
    generation = generate(scripted, [0] * length)
    # The cache holds the prompt and all new tokens but the last, which is not read again.
    assert (len(generation.tokens), generation.finish_reason) == (8 - length + 1, "length")
    assert length + len(scripted.decoded) == 8


def test_the_reference_fills_its_context_to_the_last_position() -> None:
    checkpoint, prompt = open_checkpoint(NANO), prompt_of(QUESTIONS[0])
    full = generate(ReferenceRunner(checkpoint, len(prompt) + 6), prompt, max_new_tokens=50)
    roomy = generate(ReferenceRunner(checkpoint, 256), prompt, max_new_tokens=7)
    assert full.tokens == roomy.tokens
    assert full.finish_reason == "length"


def test_the_time_of_prefill_and_decode_is_kept_apart(runner: ReferenceRunner) -> None:
    generation = generate(runner, prompt_of(QUESTIONS[0]), max_new_tokens=5)
    assert set(generation.seconds) == {"prefill", "decode"}
    assert all(seconds > 0 for seconds in generation.seconds.values())


def test_one_token_needs_no_decode(runner: ReferenceRunner) -> None:
    generation = generate(runner, prompt_of(QUESTIONS[0]), max_new_tokens=1)
    assert generation.seconds["decode"] == 0


# What is refused.


@pytest.mark.parametrize(
    ("options", "flag", "value"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens", "0"),
        ({"max_new_tokens": -3}, "--max-new-tokens", "-3"),
        ({"temperature": -0.1}, "--temperature", "-0.1"),
        ({"temperature": float("nan")}, "--temperature", "nan"),
        ({"temperature": float("inf")}, "--temperature", "inf"),
        ({"top_p": 0.0}, "--top-p", "0.0"),
        ({"top_p": 1.01}, "--top-p", "1.01"),
        ({"top_p": float("nan")}, "--top-p", "nan"),
        ({"seed": 2**63}, "--seed", str(2**63)),
        ({"seed": -1}, "--seed", "-1"),
    ],
    ids=str,
)
def test_an_option_out_of_range_is_refused_with_its_flag_and_value(
    options: dict[str, float], flag: str, value: str
) -> None:
    with pytest.raises(InputError) as raised:
        Sampling(**options)  # type: ignore[arg-type]
    assert str(raised.value).startswith(f"{flag}: {value} is out of range")
    assert raised.value.remedy.startswith("Give")


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_every_seed_that_is_accepted_samples(seed: int) -> None:
    options = {"temperature": 1.0, "seed": seed, "max_new_tokens": 3}
    assert len(generate(Scripted([3]), [0], **options).tokens) == 3


def test_an_empty_prompt_is_refused(runner: ReferenceRunner) -> None:
    with pytest.raises(InputError, match="prompt: has no tokens"):
        Generation(runner, [], [], Sampling())


@pytest.mark.parametrize("length", [8, 9])
def test_a_prompt_that_fills_the_context_is_refused_with_both_numbers(length: int) -> None:
    with pytest.raises(InputError) as raised:
        Generation(Scripted([1], context=8), [0] * length, [], Sampling())
    assert f"has {length} tokens, the context holds 8" in str(raised.value)
    assert "Shorten it" in raised.value.remedy


def test_the_longest_prompt_that_fits_is_accepted(nano: Path) -> None:
    runner = ReferenceRunner(open_checkpoint(nano), 8)
    assert len(generate(runner, [7] * 7).tokens) == 2
