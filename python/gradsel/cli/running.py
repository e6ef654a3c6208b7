"""How commands end: one line about what does not fit, how to install a missing package, or that Ctrl-C stopped them."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator

from gradsel.errors import OtherRankFailed, RunError, one_line
from gradsel.tables import printable

#: Set by ``gradsel --traceback``.
TRACEBACK = "GRADSEL_TRACEBACK"


def is_first() -> bool:
    """Whether this process prints: of those that a launcher starts, the first one does."""
    return os.environ.get("RANK", "0") == "0"


def run(name: str, command: Callable[[], None]) -> int:
    """Runs a command. What is a bug, not something given that does not fit, keeps its traceback.

    Returns:
        0; 1 if something given does not fit; 2 if a package is missing; 130 after Ctrl-C.
    """
    try:
        with _short_warnings(name):
            command()
    except (OtherRankFailed, RunError) as error:
        told = "" if isinstance(error, OtherRankFailed) else one_line(error)
        code = _end(name, 1, told, error, isinstance(error, RunError) and error.told)
        if error.together:
            _wait_for_others()
        return code
    except BrokenPipeError:  # the reader has stopped: main() ends without a message
        raise
    except OSError as error:
        if error.errno is None:
            raise
        return _end(name, 1, one_line(error), error)  # of the machine: no space left, not permitted
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("gradsel", "gradsel_kernels"):
            raise
        told = str(error)
        if "pip install" not in told:
            told = f"{error.name} is not installed: pip install 'gradsel-kernels[finetune]'"
        return _end(name, 2, told, error)
    except KeyboardInterrupt as error:
        return _end(name, 130, "stopped", error)
    except Exception as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        told = f"{one_line(error)}; pass a smaller --batch-size, and --accumulation to make up for it"
        return _end(name, 1, told, error)
    return 0


@contextlib.contextmanager
def _short_warnings(name: str) -> Iterator[None]:
    """Shows warnings as one line without the place in the code, which says nothing to whom runs a command."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *place, **more: f"gradsel {name}: warning: {one_line(message)}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def say(text: object) -> None:
    """Prints lines, which may have names from a file in them."""
    for line in str(text).split("\n"):
        print(printable(line))


def _end(name: str, code: int, told: str, error: BaseException, always: bool = False) -> int:
    if os.environ.get(TRACEBACK):
        traceback.print_exception(error)
    if told and (is_first() or always):
        print(f"gradsel {name}: {told}", file=sys.stderr, flush=True)
    return code


def _wait_for_others() -> None:
    """Until the rank that failed has told it: when the first process ends, launchers kill the others."""
    from gradsel.training.processes import join

    with contextlib.suppress(Exception):
        join().any(True)
