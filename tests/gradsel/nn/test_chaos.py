"""5,000 random sequences of everything a user may do between attach() and detach()."""

from __future__ import annotations

import warnings

import pytest
import torch

from tests.support.chaos import World
from tests.support.chaos_actions import ACTIONS, Skipped

BLOCK = 250


def check_refusal(world: World, message: str, before: dict[str, torch.Tensor]) -> None:
    """It names the parameter, and nothing has changed."""
    assert "weight" in message or "layer" in message, message
    assert "attach" in message or "trained" in message, message
    now = world.dense()
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items()), "refused, yet changed"


def play(seed: int) -> None:
    """One sequence; whatever fails prints it."""
    world = World(seed)
    try:
        world.check(thorough=False)
        for _ in range(world.random.randint(6, 9)):
            action = world.random.choice(ACTIONS)
            world.log.append(action.__name__)
            before = world.known
            try:
                action(world)
            except Skipped:
                world.log.pop()
                continue
            except (RuntimeError, ValueError) as error:
                world.log[-1] += " (refused)"
                check_refusal(world, str(error), before)
            world.check(thorough=world.random.random() < 0.05)
    except BaseException as error:
        error.add_note(f"seed {seed}: " + " -> ".join(world.log))
        raise


@pytest.mark.parametrize("block", range(5000 // BLOCK))
def test_sequences(block: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(block * BLOCK, (block + 1) * BLOCK):
            play(seed)
