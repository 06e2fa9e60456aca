"""Texts as sequences of tokens, all of one length: what models are measured and calibrated on.

The documents' tokens are put one after the other, with the begin-of-text token between them, and
cut; each sequence starts with that token, where the model has one. What is left at the end is not
used.
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
    """Sequences of `length` tokens, all or as many whole ones as `max_tokens` allow.

    Texts are read as far as they are needed. Raises InputError about `subject`, which they come
    from, where they do not fill one; `option` is what sets the length.
    """
    most = sys.maxsize if max_tokens is None else max_tokens // length
    head = [] if begin is None else [begin]
    body = length - len(head)
    sequences, rest = list[list[int]](), list[int]()
    for text in texts:
        tokens = tokenizer.encode(text)
        # A chat template may write the begin-of-text token itself; it stands there once.
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
