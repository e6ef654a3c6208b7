"""Errors that are not bugs: what was asked for cannot be done, or another process has failed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class RunError(ValueError):
    """What was asked for cannot be done, because data, model, settings or machine are not as they must be.

    The message is one line. Where a lower part of the library or of another one raised the error, that is the cause.

    Attributes:
        told: this process of several has to tell it, as the others do not; False: all of them raise it.
        together: the others wait until it is told.
        final: a run that goes on from where this happened would end in the same way.
    """

    told = False
    together = False
    final = False


class OtherRankFailed(RuntimeError):
    """Another process of a distributed run has failed, so this one stops too; the message says which, and why.

    Attributes:
        together: the other process is still there, and tells what it was.
    """

    together = False


@contextmanager
def expected() -> Iterator[None]:
    """Around code that checks or reads what users give: its ValueError and OSError become :class:`RunError`.

    Everywhere else they are bugs, and keep their type and traceback.
    """
    try:
        yield
    except RunError:
        raise
    except (ValueError, OSError) as error:
        raise RunError(one_line(error)) from error


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """``"; did you mean weight?"``, to end a message about an unknown name; empty if no known name resembles it."""
    close = difflib.get_close_matches(wrong, list(known), n=1, cutoff=0.4)
    return f"; did you mean {close[0]}?" if close else ""


def first_line(error: BaseException) -> str:
    """The first line of an error's message that is not empty."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks; its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__
