from __future__ import annotations

import pytest
import torch.distributed as dist

from tests.support.group import Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """Four processes that meet over gloo."""
    if not dist.is_gloo_available():
        pytest.skip("this build of torch has no gloo")
    group = Ranks(4, tmp_path_factory.mktemp("ranks"))
    yield group
    group.close()
