"""The operators as torch.library sees them: schemas, fakes, torch.compile; and the choice of a backend."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import gradsel_kernels as gk
from gradsel_kernels._ops import SCHEMAS
from tests.kernels import cases
from tests.kernels.adam_cases import everything

OPS = torch.ops.gradsel_kernels


def sample_inputs(op: str, device: str):
    weight = torch.randn(6, 70, device=device)
    cols = cases.random_cols(6, 70, 3).to(device)
    mask = cases.random_mask(6, 70).to(device)
    bits = gk.pack_bits(mask)
    if op.startswith("topk_rows"):
        return [(weight, 3), (weight.t(), 90), (weight.half(), 1)]
    if op == "pack_bits":
        return [(mask,), (mask.t(),)]
    if op == "unpack_bits":
        return [(bits, 70)]
    if op == "gather_rows":
        return [(weight, cols), (weight.t().contiguous().t(), cols)]
    if op == "scatter_rows_":
        return [(weight, cols, torch.randn(6, 3, device=device))]
    if op == "take_columns":
        return [(weight, cols[0]), (weight.view(2, 3, 70), cols[0])]
    if op.startswith("selected_weight_grad"):
        grad_output = torch.randn(6, 4, device=device)
        offsets = torch.tensor([0, 1, 1, 3, 3], device=device)
        return [(grad_output, weight, cols[:4], None, "auto"), (grad_output, weight, cols[0], offsets, "union")]
    if op == "selected_addmm_":
        output, values = torch.randn(6, 4, device=device), torch.randn(4, 3, device=device)
        offsets = torch.tensor([0, 1, 1, 3, 3], device=device)
        return [(output, weight, cols[:4], values, None), (output, weight, cols[0], values[0], offsets)]
    if op == "topk_masked_adam_":
        return [first_step_inputs(weight), first_step_inputs(weight.t().half())]
    return [adam_inputs(everything(torch.float32).to(device))]


def fill(tensors):
    return [torch.empty(0) if t is None else t for t in tensors]


def first_step_inputs(weight):
    def made(shape, dtype=torch.float32):
        return [torch.zeros(shape, dtype=dtype, device=weight.device)]

    rows, n = weight.shape
    states = [made((rows, 3)) for _ in range(4)]
    bits = made((rows, -(-n // 32)), torch.int32)
    return ([weight.clone()], [], [weight], *states, made(()), made((rows, 3), torch.int32), bits)


def adam_inputs(problem):
    return (
        problem.weights,
        fill(problem.values),
        problem.grads,
        problem.exp_avgs,
        problem.exp_avg_sqs,
        [],
        problem.originals,
        problem.steps,
        fill(problem.indices),
        [int(x) for x in problem.layouts],
    )


ADAM = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0}
ADAM |= {"decoupled_weight_decay": False, "maximize": False}
ADAM |= {"anchor": 0.1, "anchor_l1": False, "anchor_decoupled": False}


@pytest.mark.parametrize("op", SCHEMAS)
def test_opcheck(fast, op):
    for args in sample_inputs(op, fast):
        torch.library.opcheck(getattr(OPS, op).default, args, ADAM if "masked_adam_" in op else {})


@pytest.mark.parametrize("how", ["stochastic", "compensated"])
def test_opcheck_of_roundings_and_scaling(fast, how):
    problem = everything(torch.bfloat16, shape=(3, 40)).halve_moments().round(how).to(fast)
    options = {
        **ADAM,
        "grad_scale": torch.full((1,), 3.0, device=fast),
        "found_inf": torch.zeros((), device=fast),
        "seeds": [seed or 0 for seed in problem.seeds],
        "stochastic": [seed is not None for seed in problem.seeds],
        "compensations": fill(problem.compensations) if how == "compensated" else None,
    }
    torch.library.opcheck(OPS.masked_adam_.default, adam_inputs(problem), options)


def test_every_operator_has_a_public_function_with_a_docstring():
    for op in SCHEMAS:
        assert len(getattr(gk, op).__doc__) > 80


@pytest.mark.skipif(cases.INTERPRETED, reason="torch.compile and the interpreter do not mix")
def test_compiles_without_graph_breaks(fast):
    def select_and_step(grad, weight, state):
        cols, bits = gk.topk_rows_bits(grad, 2)
        gk.masked_adam_(
            [weight], [gk.gather_rows(grad, cols)], state[:1], state[1:2], state[2:], lr=0.1,
            indices=[cols], layouts=[gk.Layout.COLS],
        )  # fmt: skip
        return gk.unpack_bits(bits, grad.shape[1])

    def inputs():
        torch.manual_seed(1)
        state = [torch.zeros(5, 2, device=fast), torch.zeros(5, 2, device=fast), torch.zeros((), device=fast)]
        return torch.randn(5, 40, device=fast), torch.randn(5, 40, device=fast), state

    grad, weight, state = inputs()
    expected = select_and_step(grad, weight, state)
    grad, compiled_weight, state = inputs()
    compiled = torch.compile(select_and_step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(grad, compiled_weight, state), expected)
    assert torch.equal(compiled_weight, weight)
    assert float(state[2]) == 1


@pytest.mark.skipif(cases.INTERPRETED, reason="torch.compile and the interpreter do not mix")
@pytest.mark.parametrize("how", ["stochastic", "compensated"])
def test_roundings_and_scaling_compile(fast, how):
    def step(weight, grad, moments, count, left, scale, found):
        gk.masked_adam_(
            [weight], [grad], moments[:1], moments[1:], [count], lr=0.01, grad_scale=scale, found_inf=found,
            seeds=[5 if how == "stochastic" else None], compensations=[left if how == "compensated" else None],
        )  # fmt: skip

    def inputs():
        torch.manual_seed(1)
        weight, grad = (torch.randn(300, device=fast).bfloat16() for _ in range(2))
        moments = [torch.zeros(300, dtype=torch.bfloat16, device=fast) for _ in range(2)]
        left = torch.zeros_like(weight)
        return weight, grad, moments, torch.zeros((), device=fast), left, torch.full((), 2.0, device=fast)

    *expected, scale = inputs()
    step(*expected, scale, torch.zeros_like(scale))
    *compiled, scale = inputs()
    torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled, scale, torch.zeros_like(scale))
    assert float(compiled[3]) == 1
    for got, wanted in zip(
        (compiled[0], *compiled[2], compiled[4]), (expected[0], *expected[2], expected[4]), strict=True
    ):
        assert torch.equal(got, wanted)


def test_use_backend_sets_and_restores():
    from gradsel_kernels import backends

    assert backends._forced is None
    with gk.use_backend("reference"):
        assert backends._forced == "reference"
        with gk.use_backend(None):
            assert backends._forced is None
        assert backends._forced == "reference"
    assert backends._forced is None
    gk.use_backend("reference")
    gk.use_backend("auto")
    assert backends._forced is None


def test_use_backend_refuses_an_unknown_name():
    with pytest.raises(ValueError, match=r"'cudnn'.*native, triton, cuda, reference"):
        gk.use_backend("cudnn")


@pytest.mark.skipif(cases.INTERPRETED, reason="the interpreter does run on CPU tensors")
def test_a_backend_that_cannot_run_says_why():
    with (
        gk.use_backend("triton"),
        pytest.raises(RuntimeError, match=r"triton.*TRITON_INTERPRET"),
    ):
        gk.topk_rows(torch.ones(2, 3), 1)


def test_show_config(capsys):
    gk.show_config()
    printed = capsys.readouterr().out
    for word in (gk.__version__, torch.__version__, "native", "triton", "reference", "threads"):
        assert word in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_no_package_is_advised_for_it(capsys):
    gk.show_config()
    lines = capsys.readouterr().out.splitlines()
    for name in ("triton", "cuda"):
        (line,) = (line for line in lines if line.split()[0] == name)
        assert "off: torch finds no CUDA device" in line
        assert "install" not in line


def test_a_native_module_with_another_table_is_refused():
    from gradsel_kernels.adam_item import ITEM_LAYOUT
    from gradsel_kernels.backends import native

    size, offsets = ITEM_LAYOUT
    assert native._mismatch(SimpleNamespace(ABI=native.ABI, ADAM_ITEM=ITEM_LAYOUT)) is None
    swapped = {**offsets, "step": offsets["seed"], "seed": offsets["step"]}
    reason = native._mismatch(SimpleNamespace(ABI=native.ABI, ADAM_ITEM=(size, swapped)))
    assert "another AdamItem" in reason
    assert "install again" in reason
    assert f"not {native.ABI}" in native._mismatch(SimpleNamespace())
