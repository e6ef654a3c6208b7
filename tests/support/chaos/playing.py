"""One sequence of random actions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tests.support.chaos.actions import ACTIONS
from tests.support.chaos.world import Skipped, World


def play(seed: int, actions: Sequence[Callable[[World], None]] = ACTIONS) -> None:
    """Whatever fails prints the sequence."""
    world = World(seed)
    try:
        world.check(thorough=False)
        for _ in range(world.random.randint(6, 9)):
            action = world.random.choice(actions)
            world.log.append(action.__name__)
            try:
                action(world)
            except Skipped:
                world.log.pop()
                continue
            world.check(thorough=world.random.random() < 0.05)
    except BaseException as error:
        error.add_note(f"seed {seed}: " + " -> ".join(world.log))
        raise
