"""Ctrl-C at any line: attach, detach and deltas happen whole or not at all."""

from __future__ import annotations

import copy
import linecache
import random
import signal
import sys
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradsel
from gradsel.attached import is_attached
from gradsel.interrupts import uninterrupted
from tests.support.selections import check_consistent, random_selection

SAMPLES = 120


def interrupted_at(line: int, run: Callable[[], Any]) -> tuple[bool, int]:
    """Runs a function and presses Ctrl-C when it has come to so many lines of the library.

    Not at a ``with``: there, CPython may leave the block without calling ``__exit__``, whoever wrote it (issue 29988).

    Returns:
        Whether it was interrupted, and how many lines it has run.
    """
    count = 0

    def trace(frame: FrameType, event: str, argument: Any):
        nonlocal count
        if "gradsel" not in frame.f_code.co_filename or "tests" in frame.f_code.co_filename:
            return None
        source = linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip()
        if event == "line" and not source.startswith("with "):
            count += 1
            if count == line:
                signal.raise_signal(signal.SIGINT)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    except KeyboardInterrupt:
        return True, count
    finally:
        sys.settrace(before)
    return False, count


def lines(make: Callable[[], Callable[[], Any]]) -> list[int]:
    """Lines at which to interrupt what ``make`` returns: the last ones, which write, and a sample of the others."""
    make()()  # what is done once for all
    _, count = interrupted_at(-1, make())
    last = range(max(1, count - 150), count + 1)
    drawn = random.Random(0).sample(range(1, count + 1), min(count, SAMPLES))
    return sorted({*last, *drawn})


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten()), nn.Linear(8, 3))


SELECTION = random_selection(model(), freeze=["1.0.bias"])


def state(found: nn.Module) -> tuple:
    """What attach() and detach() change."""
    names = [(name, id(p), type(p), p.requires_grad) for name, p in found.named_parameters()]
    hooks = [(len(m._forward_pre_hooks), len(m._load_state_dict_pre_hooks), sorted(vars(m))) for m in found.modules()]
    return names, hooks


def test_attach_and_detach() -> None:
    for line in lines(lambda: partial(gradsel.attach, model(), SELECTION)):
        found = model()
        before = state(found)
        hit, _ = interrupted_at(line, partial(gradsel.attach, found, SELECTION))
        assert hit
        if is_attached(found):
            check_consistent(found)
            assert len(gradsel.trainable_parameters(found)) == 5
            gradsel.detach(found)
        assert state(found) == before, line


@pytest.mark.parametrize("restore", [False, True])
def test_detach(restore: bool) -> None:
    def trained() -> nn.Module:
        found = model()
        gradsel.attach(found, SELECTION)
        with torch.no_grad():
            for p in gradsel.trainable_parameters(found):
                p.add_(1)
        return found

    plain = copy.deepcopy(gradsel.detach(trained(), restore=restore).state_dict())
    for line in lines(lambda: partial(gradsel.detach, trained(), restore=restore)):
        found = trained()
        assert interrupted_at(line, partial(gradsel.detach, found, restore=restore))[0]
        if is_attached(found):
            gradsel.detach(found, restore=restore)  # once more
        assert_same(found, plain)


def delta() -> gradsel.Delta:
    found = model()
    gradsel.attach(found, SELECTION)
    with torch.no_grad():
        for p in gradsel.trainable_parameters(found):
            p.add_(1)
    return gradsel.Delta.of(found)


def assert_same(found: nn.Module, expected: dict[str, Tensor]) -> None:
    assert list(found.state_dict()) == list(expected)
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def is_one_of(found: nn.Module, *states: dict[str, Tensor]) -> bool:
    own = found.state_dict()
    return any(all(torch.equal(tensor, state[name]) for name, tensor in own.items()) for state in states)


def test_deltas() -> None:
    made = delta()
    base = model()
    with made.applied(base):
        tuned = copy.deepcopy(base.state_dict())
    plain = copy.deepcopy(base.state_dict())

    def inside() -> None:
        with made.applied(base):
            pass

    for line in lines(lambda: inside):
        assert interrupted_at(line, inside)[0]
        assert_same(base, plain)
    for line in lines(lambda: partial(made.apply_, model())):
        found = model()
        interrupted_at(line, partial(made.apply_, found))  # or not: how many lines there are depends on other deltas
        assert is_one_of(found, plain, tuned), line

    def attached() -> nn.Module:
        found = model()
        gradsel.attach(found, SELECTION)
        return found

    for line in lines(lambda: partial(gradsel.load_delta, attached(), made)):
        found = attached()
        assert interrupted_at(line, partial(gradsel.load_delta, found, made))[0]
        gradsel.detach(found)
        assert is_one_of(found, plain, tuned), line


def test_a_block_runs_to_its_end() -> None:
    done = []

    def run() -> None:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append(1)

    with pytest.raises(KeyboardInterrupt):
        run()
    assert done == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
