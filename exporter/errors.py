"""Errors that a user can act on: the value, the reason, the remedy.

Their text may hold names and values of foreign files, so it is bounded and printable.
"""

import re
import reprlib

#: The longest subject, problem or remedy of an error, in characters.
_LONGEST = 1000
#: The longest value in an error, in characters.
_LONGEST_VALUE = 200
#: Control characters, line separators, overrides of the direction of text, surrogates.
_OTHERS = "\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff"
_STEERING = re.compile(f"[\x00-\x1f{_OTHERS}]")
_STEERING_BUT_LINES = re.compile(f"[\x00-\x08\x0b-\x1f{_OTHERS}]")


class ExporterError(Exception):
    """Base of every error that the command line reports without a traceback (exit code 2)."""


class InputError(ExporterError):
    """Something the user gave cannot be used.

    The message reads ``subject: what is wrong with it. Remedy.``
    """

    def __init__(self, subject: object, problem: str, remedy: str = "") -> None:
        self.subject, self.problem, self.remedy = map(_shown, (subject, problem, remedy))
        text = f"{self.subject}: {self.problem}."
        super().__init__(text + (f" {self.remedy}." if self.remedy else ""))


class MissingExtraError(InputError):
    """A toolkit that this step needs is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            package,
            "is not installed and this step needs it",
            f"Run: pip install 'mobilellm-exporter[{extra}]'",
        )


def short(value: object) -> str:
    """The `repr` of a value in at most 200 characters; the whole text is never built."""
    text = _REPR.repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 1]}…"


def printable(text: str, *, lines: bool = False) -> str:
    """The text with escapes such as ``\\x1b`` for characters that steer a terminal, change the
    direction of text, or stand for undecodable bytes. With `lines`, newlines and tabs are kept."""
    return (_STEERING_BUT_LINES if lines else _STEERING).sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()


def _shown(value: object) -> str:
    text = str(value)
    if len(text) > _LONGEST:
        half = _LONGEST // 2
        text = f"{text[:half]} … {text[-half:]}"
    return printable(text)


def _limited_repr() -> reprlib.Repr:
    limited = reprlib.Repr()
    limited.maxlevel = 3
    limited.maxdict = limited.maxlist = limited.maxtuple = limited.maxset = 40
    limited.maxstring = limited.maxlong = limited.maxother = _LONGEST_VALUE
    return limited


_REPR = _limited_repr()
