"""Cut texts into token sequences of equal length, for evaluation and calibration.

The tokens of all documents are concatenated, with the begin-of-text token before each, and cut.
Each sequence starts with that token, where the model has one. The incomplete last sequence is
dropped.
"""

import sys
from collections.abc import Iterable

from exporter.errors import InputError
from exporter.text.tokenizer import TextTokenizer


def cut_sequences(
    texts: Iterable[str],
    tokenizer: TextTokenizer,
    begin: int | None,
    length: int,
    max_tokens: int | None,
    subject: object = "the text",
    option: str = "the length",
) -> list[list[int]]:
    """All sequences of `length` tokens, or as many as `max_tokens` tokens allow.

    `begin` is the begin-of-text token, if there is one. Texts are read only as far as needed.
    Raises InputError where they do not fill one sequence: `subject` is their source, and `option`
    the setting that determines the length.
    """
    most = sys.maxsize if max_tokens is None else max_tokens // length
    head = [] if begin is None else [begin]
    body = length - len(head)
    sequences, rest = list[list[int]](), list[int]()
    for text in texts:
        tokens = tokenizer.encode(text)
        # A chat template may write the begin-of-text token itself: it must not be there twice.
        rest += head + (tokens[1:] if head and tokens[:1] == head else tokens)
        start = 0
        while len(sequences) < most:
            start += bool(head) and rest[start : start + 1] == head
            if start + body > len(rest):
                break
            sequences.append(head + rest[start : start + body])
            start += body
        if len(sequences) == most:
            break
        rest = rest[start:]
    if not sequences:
        count = len(rest) + len(head)
        raise InputError(
            subject,
            f"gives {count} tokens, less than one sequence of {length}",
            f"Give more text, or lower {option}",
        )
    return sequences
