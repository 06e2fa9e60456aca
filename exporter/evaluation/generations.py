"""Compare the greedy generations of two models: where do they diverge?

mobilellm evaluate build/nano --task problems.jsonl --generations 20 --reference DIR
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from exporter.errors import InputError
from exporter.evaluation.perplexity import bands
from exporter.inference.generation import Generation, Sampling
from exporter.inference.loaded_model import LoadedModel
from exporter.progress import OnStep


@dataclass(frozen=True)
class Written:
    """The new tokens after one prompt. `ended` is whether the model ended the text itself."""

    tokens: tuple[int, ...]
    ended: bool


@dataclass(frozen=True)
class SameTokens:
    """The share of equal tokens at the new positions `first`..`last`.

    Only positions that both generations have count; the end of a text counts as a token.
    """

    first: int
    last: int
    agreement: float


@dataclass(frozen=True)
class GenerationScore:
    """The comparison of two models over all prompts.

    `first_divergence` has, for each prompt, the first new position with different tokens, or None.
    Its median takes the length of the text for None. `identical_generations` is a share.
    """

    generations: int
    identical_generations: float
    first_divergence: tuple[int | None, ...]
    median_first_divergence: float
    generation_agreement_by_position: tuple[SameTokens, ...]


def check_prompts(model: LoadedModel, prompts: Sequence[Sequence[int]]) -> None:
    """Raise InputError for a prompt that the model cannot read, before the first generation."""
    for number, prompt in enumerate(prompts, 1):
        try:
            Generation(model.runner, prompt, (), Sampling())
        except InputError as error:
            subject = f"problem {number}: {error.subject}"
            raise InputError(subject, error.problem, error.remedy) from error


def write_texts(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    on_step: OnStep,
) -> list[Written]:
    """Continue every prompt greedily, to the end of the text or for `max_new_tokens`."""
    written, unended = list[Written](), 0
    for index, prompt in enumerate(prompts):
        on_step(index, len(prompts), f"{unended} never ended" if unended else "")
        generation = Generation(model.runner, prompt, model.eos_token_ids, Sampling(max_new_tokens))
        tokens = tuple(generation)
        written.append(Written(tokens, generation.finish_reason == "stop"))
        unended += not written[-1].ended
    on_step(len(prompts), len(prompts), f"{unended} never ended" if unended else "")
    return written


def compare_texts(reference: Sequence[Written], others: Sequence[Written]) -> GenerationScore:
    """Compare two models' generations of the same prompts, in the same order.

    Raises InputError where there are none.
    """
    if not reference:
        raise InputError("--generations", "there are none to compare", "Give 1 or more")
    places, lengths, same = list[int | None](), list[int](), list[list[bool]]()
    for one, other in zip(reference, others, strict=True):
        pairs = list(zip(_with_end(one), _with_end(other), strict=False))
        equal = [a == b for a, b in pairs]
        places.append(equal.index(False) if False in equal else None)
        lengths.append(len(pairs))
        same.append(equal)
    shared = [
        SameTokens(first, last - 1, sum(found) / len(found))
        for first, last in bands(max(lengths))
        if (found := [value for equal in same for value in equal[first:last]])
    ]
    positions = [n if p is None else p for p, n in zip(places, lengths, strict=True)]
    return GenerationScore(
        generations=len(places),
        identical_generations=sum(place is None for place in places) / len(places),
        first_divergence=tuple(places),
        median_first_divergence=float(median(positions)),
        generation_agreement_by_position=tuple(shared),
    )


def _with_end(written: Written) -> tuple[int, ...]:
    """The tokens, with -1 for the end where the model ended the text."""
    return (*written.tokens, -1) if written.ended else written.tokens
