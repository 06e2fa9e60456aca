r"""Accuracy of a model on problems with one right answer, by exact match.

    mobilellm evaluate build/nano --task problems.jsonl

A row of the file has a `prompt` (or `question`) and its `answer`. The answer of a text is the
content of its last ``\boxed{}`` or what follows its last ``####`` (GSM8K), whichever is later.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from pathlib import Path

from exporter.errors import InputError
from exporter.evaluation.generations import Written
from exporter.text.documents import Row, read_rows, text_field
from exporter.text.tokenizer import TextTokenizer

PROMPT_FIELDS, ANSWER_FIELD = ("prompt", "question"), "answer"
_MARK = re.compile(r"\\boxed\s*\{|####")
_BRACE = re.compile(r"[{}]")
#: The first line that is not empty.
_LINE = re.compile(r"\s*(.*)")
#: The precision of Decimal. Longer numbers are compared as text.
_DIGITS = 28
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?")


@dataclass(frozen=True)
class Problem:
    """A prompt and its right answer."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Attempt:
    """The model's result on one problem. `found` is None where its text has no answer."""

    expected: str
    found: str | None
    solved: bool
    tokens: int
    ended: bool


@dataclass(frozen=True)
class TaskScore:
    """The result on all problems.

    `accuracy`, `answered` (with any answer) and `never_ended` are shares of all problems. A text
    never ended where the limit of new tokens or the end of the context cut it off. `correct` has 1
    for each solved problem and 0 for each other, in the order of the file, so that two models can
    be compared problem by problem. The standard error of an accuracy a is sqrt(a (1 - a) /
    problems).
    """

    problems: int
    accuracy: float
    answered: float
    never_ended: float
    mean_tokens: float
    correct: tuple[int, ...]
    attempts: tuple[Attempt, ...]


def read_problems(path: Path, limit: int | None = None) -> list[Problem]:
    """The first `limit` problems of a JSONL or parquet file.

    Raises InputError with the line or row, or where there are none.
    """
    problems = [
        Problem(text_field(row, place, PROMPT_FIELDS), _expected(row, place))
        for place, row in islice(read_rows(path), limit and min(limit, sys.maxsize))
    ]
    if not problems:
        raise InputError(path, "holds no problems", "Give one object a line")
    return problems


def score_problems(
    problems: Sequence[Problem], written: Sequence[Written], tokenizer: TextTokenizer
) -> TaskScore:
    """Score the texts that a model wrote, one for each problem."""
    attempts = list[Attempt]()
    for problem, text in zip(problems, written, strict=True):
        found = find_answer(tokenizer.decode(text.tokens))
        solved = found is not None and plain_answer(found) == plain_answer(problem.answer)
        attempts.append(Attempt(problem.answer, found, solved, len(text.tokens), text.ended))
    count = len(attempts)
    return TaskScore(
        problems=count,
        accuracy=sum(attempt.solved for attempt in attempts) / count,
        answered=sum(attempt.found is not None for attempt in attempts) / count,
        never_ended=sum(not attempt.ended for attempt in attempts) / count,
        mean_tokens=sum(attempt.tokens for attempt in attempts) / count,
        correct=tuple(int(attempt.solved) for attempt in attempts),
        attempts=tuple(attempts),
    )


def find_answer(text: str) -> str | None:
    r"""The content of the last closed ``\boxed{}`` or what follows the last ``####``, or None."""
    closed = _closing_braces(text)
    for mark in reversed(list(_MARK.finditer(text))):
        if mark[0].endswith("{"):
            answer = text[mark.end() : closed.get(mark.end() - 1, mark.end())]
        else:
            line = _LINE.match(text, mark.end())
            answer = line[1] if line else ""
        if answer.strip():
            return answer.strip()
    return None


def plain_answer(answer: str) -> str:
    """The answer in a normal form, in which equal values are equal text.

    Outer spaces and dollar signs, a final period and thousands separators are removed; numbers are
    written in one way.
    """
    text = answer.strip().replace("\\$", "$").strip("$").strip().removesuffix(".").strip()
    number = text.replace(",", "") if _THOUSANDS.fullmatch(text) else text
    if len(number) > _DIGITS:
        return text
    try:
        value = Decimal(number)
        return str(value.normalize() + 0) if value.is_finite() else text
    except ArithmeticError:  # not a number, or one that is too large
        return text


def _expected(row: Row, place: str) -> str:
    value = row.get(ANSWER_FIELD)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    answers: Mapping[str, object] = {ANSWER_FIELD: str(value)} if number else row
    text = text_field(answers, place, (ANSWER_FIELD,))
    found = find_answer(text)
    return text.strip() if found is None else found


def _closing_braces(text: str) -> dict[int, int]:
    """The place of each closed brace → the place of the brace that closes it."""
    closed, opened = dict[int, int](), list[int]()
    for brace in _BRACE.finditer(text):
        if brace[0] == "{":
            opened.append(brace.start())
        elif opened:
            closed[opened.pop()] = brace.start()
    return closed
