r"""Problems with one right answer: how many a model solves, by exact match.

    mobilellm evaluate build/nano --task problems.jsonl

A row of the file has a `prompt` (or `question`) and its `answer`. The answer of a text is what
stands in its last ``\boxed{}`` or after its last ``####``, as in GSM8K, whichever comes later.
"""

import re
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
#: Decimal's own precision: longer numbers are compared as they are written.
_DIGITS = 28
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?")


@dataclass(frozen=True)
class Problem:
    prompt: str
    answer: str


@dataclass(frozen=True)
class Attempt:
    """What was made of one problem; `found` is None when the text has no answer."""

    expected: str
    found: str | None
    solved: bool
    tokens: int
    ended: bool


@dataclass(frozen=True)
class TaskScore:
    """Shares of all problems: solved (`accuracy`), with any answer, and never ended, that is cut
    off at the limit of new tokens or where the context was full."""

    problems: int
    accuracy: float
    answered: float
    never_ended: float
    mean_tokens: float
    attempts: tuple[Attempt, ...]


def read_problems(path: Path, limit: int | None = None) -> list[Problem]:
    """The first `limit` problems of a JSONL or parquet file. Raises InputError with the line."""
    problems = [
        Problem(text_field(row, place, PROMPT_FIELDS), _expected(row, place))
        for place, row in islice(read_rows(path), limit)
    ]
    if not problems:
        raise InputError(path, "holds no problems", "Give one object a line")
    return problems


def score_problems(
    problems: Sequence[Problem], written: Sequence[Written], tokenizer: TextTokenizer
) -> TaskScore:
    """Read the answers out of what a model has written to each problem."""
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
        attempts=tuple(attempts),
    )


def find_answer(text: str) -> str | None:
    r"""What stands in the last whole ``\boxed{}`` or after the last ``####``, or None."""
    for mark in reversed(list(_MARK.finditer(text))):
        rest = text[mark.end() :]
        answer = _braced(rest) if mark[0].endswith("{") else rest.strip().partition("\n")[0]
        if answer and answer.strip():
            return answer.strip()
    return None


def plain_answer(answer: str) -> str:
    """The answer without what changes no value: spaces around it, dollar signs, a final period,
    separators of thousands, and how a number is written."""
    text = answer.strip().replace("\\$", "$").strip("$").strip().removesuffix(".").strip()
    number = text.replace(",", "") if _THOUSANDS.fullmatch(text) else text
    if len(number) > _DIGITS:
        return text
    try:
        value = Decimal(number)
        return str(value.normalize() + 0) if value.is_finite() else text
    except ArithmeticError:  # not a number, or one too large to write down
        return text


def _expected(row: Row, place: str) -> str:
    value = row.get(ANSWER_FIELD)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    answers: Mapping[str, object] = {ANSWER_FIELD: str(value)} if number else row
    text = text_field(answers, place, (ANSWER_FIELD,))
    found = find_answer(text)
    return text.strip() if found is None else found


def _braced(text: str) -> str | None:
    """Up to the brace that closes the one before `text`; None where it is never closed."""
    depth = 1
    for index, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:index]
    return None
