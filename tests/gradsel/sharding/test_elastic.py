"""A rank is killed, torchrun starts all ranks again, and training ends as if nothing had happened."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.support import elastic
from tests.support.sharded import models

ROOT = Path(__file__).parents[3]


@pytest.mark.supports("DCP", "save/load")
@pytest.mark.skipif(not dist.is_gloo_available(), reason="this build of torch has no gloo")
def test_restart_after_a_killed_rank(tmp_path):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}", "OMP_NUM_THREADS": "1"}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else restarted ranks find the addresses of dead ones
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launched = subprocess.run(
        [*command, "--max-restarts", "1", elastic.__file__, str(tmp_path)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert launched.returncode == 0, launched.stderr
    assert "failed (exitcode: -9) local_rank: 1" in launched.stderr
    start, _, selection = models()
    before = start.state_dict()
    for rank in range(2):
        found = torch.load(tmp_path / f"rank-{rank}.pt")
        assert found["done"] == elastic.KILLED_AT - 1, "it went on from another checkpoint than the last whole one"
        restarted, unkilled = found["restarted"], found["unkilled"]
        assert restarted.keys() == unkilled.keys() > before.keys()
        for name, tensor in unkilled.items():
            assert torch.equal(restarted[name], tensor), name
        for name, mask in selection.items():
            selected = mask.to_dense()
            assert torch.equal(restarted[name][~selected], before[name][~selected]), name
            if mask.nnz and not mask.is_whole:
                assert torch.equal(restarted[name + "_values"], mask.gather(restarted[name])), name
            unused = not mask.nnz or name.startswith("tokens")
            assert unused or not torch.equal(restarted[name], before[name]), name
