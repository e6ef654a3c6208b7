"""Random sequences of everything a user may do between attach() and detach().

After each action the forward is that of the dense model with the same values, frozen bits are unmoved, and now and then
base and delta make the model. GRADSEL_CHAOS=5000 plays 5,000 sequences; see CONTRIBUTING.md.
"""

from __future__ import annotations

import os
import warnings

import pytest
import torch
import torch.distributed as dist

from tests.support.chaos.playing import play
from tests.support.chaos.ranks import play_together

SEQUENCES = int(os.environ.get("GRADSEL_CHAOS", "300"))
BLOCK = 50


@pytest.mark.parametrize("first", range(0, SEQUENCES, BLOCK))
def test_sequences(first: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(first, min(first + BLOCK, SEQUENCES)):
            play(seed)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this build of torch has no gloo")
def test_two_ranks(tmp_path) -> None:
    torch.multiprocessing.spawn(play_together, (str(tmp_path), SEQUENCES // 12), nprocs=2)
