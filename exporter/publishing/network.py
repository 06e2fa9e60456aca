"""Errors of the network and of the clients, as errors that a user can act on."""

from collections.abc import Iterator
from contextlib import contextmanager

from exporter.errors import InputError


@contextmanager
def network_errors(subject: object, login: str) -> Iterator[None]:
    """Report whatever fails in the block as an InputError; `login` is the command that stores a
    login."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # a client may raise anything for an answer that it does not expect
        reason = next(iter(str(error).strip().splitlines()), "")
        raise InputError(
            subject,
            f"was not published ({type(error).__name__}: {reason})",
            f"Check the address and the network; {login} stores a login",
        ) from error
