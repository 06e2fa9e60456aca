"""Errors that a user can act on: the value, the reason, the remedy."""


class ExporterError(Exception):
    """Base of every error that the command line reports without a traceback (exit code 2)."""


class InputError(ExporterError):
    """Something the user gave cannot be used.

    The message reads ``subject: what is wrong with it. Remedy.``
    """

    def __init__(self, subject: object, problem: str, remedy: str = "") -> None:
        self.subject, self.problem, self.remedy = str(subject), problem, remedy
        super().__init__(f"{subject}: {problem}." + (f" {remedy}." if remedy else ""))


class MissingExtraError(InputError):
    """A toolkit that this step needs is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            package,
            "is not installed and this step needs it",
            f"Run: pip install 'mobilellm-exporter[{extra}]'",
        )
