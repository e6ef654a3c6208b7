"""Arguments that masked_adam_ refuses, with no tensor changed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import gradsel_kernels as gk
from gradsel_kernels import Layout
from tests.kernels.adam_cases import adam_arguments


def test_no_tensors():
    gk.masked_adam_([], [], [], [], [], lr=0.1)


HALF_WEIGHT = {"weights": [torch.ones(2, 3).half()]}
COMPENSATED = {**HALF_WEIGHT, "compensations": [torch.zeros(2, 1).half()]}
BF16_MOMENTS = {"exp_avgs": [torch.zeros(2, 1).bfloat16()], "exp_avg_sqs": [torch.zeros(2, 1).bfloat16()]}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"grads": []}, ValueError, "grads has 0 entries, but weights has 1"),
        ({"values": [torch.ones(2, 1)] * 2}, ValueError, "values has 2 entries"),
        ({"grads": [torch.ones(3, 2)]}, ValueError, r"tensor 0: grad must be dense .*weight \[2, 3\]"),
        ({"grads": [torch.ones(2, 3).to_sparse()]}, TypeError, "does not support sparse gradients"),
        ({"grads": [torch.ones(2, 3, dtype=torch.complex64)]}, TypeError, "complex tensors are not supported"),
        ({"grads": [torch.ones(2, 3, device="meta")]}, ValueError, "grad is on meta"),
        ({"exp_avgs": [torch.zeros(2, 1).half()]}, TypeError, "exp_avg must be float32 or bfloat16"),
        ({"exp_avgs": [torch.zeros(2, 1).bfloat16()]}, ValueError, "exp_avg_sq must match exp_avg .torch.bfloat16"),
        ({**BF16_MOMENTS, "values": [torch.ones(2, 1).bfloat16()]}, ValueError, "values must match .*torch.float32"),
        ({**BF16_MOMENTS, "originals": [torch.ones(2, 1).bfloat16()]}, ValueError, "original must match .*float32"),
        ({**BF16_MOMENTS, "weights": [torch.ones(2, 3).double()]}, TypeError, "a state of torch.bfloat16 cannot train"),
        ({"grad_scale": torch.ones(2)}, ValueError, r"grad_scale must be one float32 on cpu, got torch.float32 \[2\]"),
        ({"grad_scale": torch.ones(1).double()}, ValueError, "grad_scale must be one float32 .*float64"),
        ({"found_inf": torch.ones(1).bool()}, ValueError, "found_inf must be one float32 .*bool"),
        ({"found_inf": torch.ones((), device="meta")}, ValueError, "found_inf must be one float32 on cpu, .* on meta"),
        ({"seeds": [1, 2]}, ValueError, "seeds has 2 entries"),
        ({**HALF_WEIGHT, "seeds": [2**63]}, ValueError, "tensor 0: seed must be an int64, .*got 9223372036854775808"),
        ({"seeds": [1]}, TypeError, "tensor 0: a seed needs a bfloat16 or float16 weight, got torch.float32"),
        ({"compensations": [torch.zeros(2, 1)]}, TypeError, "0: a compensation needs .* weight, got torch.float32"),
        ({**HALF_WEIGHT, "seeds": [1], "values": [torch.ones(2, 1)]}, ValueError, "seed.*weight.*values"),
        ({**COMPENSATED, "values": [torch.ones(2, 1)]}, ValueError, "compensation.*weight.*values"),
        ({**COMPENSATED, "seeds": [1]}, ValueError, "tensor 0.*seed.*compensation"),
        ({**COMPENSATED, "compensations": [torch.zeros(2, 1)]}, ValueError, "compensation.*float16"),
        ({**COMPENSATED, "compensations": [torch.zeros(2).half()]}, ValueError, r"compensation.*\[2, 1\]"),
        ({**COMPENSATED, "compensations": [None, None]}, ValueError, "compensations.* 2 "),
        (
            {**HALF_WEIGHT, "compensations": [torch.zeros(2, 2).half()[:, :1]]},
            ValueError,
            "compensation.*contiguous",
        ),
        (
            {"weights": [None], "values": [torch.ones(2, 1)], "grads": [torch.ones(2, 1)], "seeds": [1]},
            ValueError,
            "seed.*weight.*none",
        ),
        (
            {**HALF_WEIGHT, "seeds": [1], "exp_avgs": [torch.zeros(2, 1).double()],
             "exp_avg_sqs": [torch.zeros(2, 1).double()]},
            TypeError,
            "seed.*float32 or bfloat16.*float64",
        ),
        ({"exp_avg_sqs": [torch.zeros(2, 2)]}, ValueError, "exp_avg_sq.*exp_avg"),
        ({"values": [torch.zeros(2, 1).half()]}, ValueError, "values.*exp_avg"),
        ({"originals": [torch.ones(2, 1)] * 2}, ValueError, "originals.* 2 "),
        ({"originals": [torch.ones(2, 1).bfloat16()]}, ValueError, "original.*exp_avg"),
        ({"originals": [torch.ones(2, 2)[:, :1]]}, ValueError, "original.*contiguous"),
        ({"originals": [torch.ones(2, 1, device="meta")]}, ValueError, "original.*meta"),
        ({"indices": [torch.zeros(2, 2, dtype=torch.int32)]}, ValueError, r"exp_avg \[2, 1\]"),
        ({"exp_avgs": []}, ValueError, "exp_avgs.* 0 "),
        ({"indices": [torch.zeros(2, 1, dtype=torch.int32, device="meta")]}, ValueError, "indices.*meta"),
        ({"indices": [torch.zeros(2, 1)]}, ValueError, r"columns must be int32 \[rows, k\]"),
        ({"layouts": [9]}, ValueError, "layout 9"),
        ({"layouts": [Layout.FLAT], "indices": [torch.zeros(3, dtype=torch.int32)]}, ValueError, "indices.* 2"),
        ({"weights": [torch.ones(3, 3)]}, ValueError, "mask.* 2 rows"),
        ({"weights": [torch.ones(2, 3).double()]}, TypeError, "float64.*float32"),
        ({"weights": [torch.ones(1, 3).expand(2, 3)]}, ValueError, "stride 0"),
        ({"weights": [None]}, ValueError, "values.*weight"),
        ({"steps": [torch.zeros((), dtype=torch.int64)]}, ValueError, "step.*float"),
    ],
)  # fmt: skip
def test_bad_input(changes, error, message):
    arguments = adam_arguments(**changes)
    lists = [given for given in arguments.values() if isinstance(given, list)]
    before = [given.clone() for tensors in lists for given in tensors if isinstance(given, Tensor)]
    with pytest.raises(error, match=message):
        gk.masked_adam_(**arguments)
    after = [given for tensors in lists for given in tensors if isinstance(given, Tensor)]
    assert all(a.device.type == "meta" or a.is_sparse or torch.equal(a, b) for a, b in zip(after, before, strict=True))
