"""A described call is repeated only if nothing but gradients has changed, whatever happens to its tensors."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

import gradsel_kernels as gk
from gradsel_kernels import adam_repeat
from gradsel_kernels.adam_call import AdamOptions
from gradsel_kernels.adam_repeat import RepeatedAdam, Source, Written, can_repeat
from gradsel_kernels.backends import native
from tests.kernels.cases import same_bits

pytestmark = pytest.mark.skipif(native.broken is not None, reason=f"the C++ extension checks calls: {native.broken}")

OPTIONS = AdamOptions(0.01, 0.9, 0.999, 1e-8, 0.0, False, False, 0.0, False, False)


@pytest.fixture(params=["C functions of torch", "methods of Python"], autouse=True)
def access(request):
    """Tensors are read by torch's C functions where it has them, and by Python's methods otherwise."""
    adam_repeat._use_torch()
    module = native.module()
    addresses = adam_repeat.torch_functions()
    if request.param == "methods of Python":
        module.use_torch(torch._C.TensorBase, torch._C._increment_version, {})
    elif not addresses:
        pytest.skip(f"torch {torch.__version__} does not export them")
    yield
    module.use_torch(torch._C.TensorBase, torch._C._increment_version, addresses)


class Step:
    """Two weights, one with a compact gradient and one with a dense one, and the call that trains them."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.parameters = [nn.Parameter(torch.randn(6, 5, generator=generator)) for _ in range(2)]
        self.values = nn.Parameter(self.parameters[0].detach()[:, :2].clone())
        self.without = nn.Parameter(torch.zeros(3))
        self.group = {"params": [self.values, self.parameters[1], self.without]}
        self.held = {"weight": self.parameters[0]}
        cols = torch.tensor([[0, 1]] * 6, dtype=torch.int32)
        self.states = [
            {"exp_avg": torch.zeros(6, 2), "exp_avg_sq": torch.zeros(6, 2), "step": torch.zeros(())} for _ in range(2)
        ]
        self.lists = {
            "weights": [p.detach() for p in self.parameters],
            "grads": [torch.ones(6, 2), torch.ones(6, 5)],
            **{f"{key}s": [state[key] for state in self.states] for key in self.states[0]},
            "indices": [cols, cols.clone()],
            "layouts": [gk.Layout.COLS] * 2,
            "values": [self.values.detach(), None],
        }
        self.new_gradients()
        self.noted = [self.values._version]
        self.repeated = RepeatedAdam(
            {**self.lists, "grads": [self.values.grad, self.parameters[1].grad]},
            [Source(self.values), Source(self.parameters[1])],
            [(self.held, "weight", self.parameters[0]), *((s, k, v) for s in self.states for k, v in s.items())],
            [self.group["params"]],
            [self.without],
            [Written(self.values, self.noted), *map(Written, self.parameters)],
        )

    def new_gradients(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.values.grad = torch.randn(6, 2, generator=generator)
        self.parameters[1].grad = torch.randn(6, 5, generator=generator)

    def tensors(self) -> list[torch.Tensor]:
        return [*self.parameters, self.values, *(t for s in self.states for t in s.values())]


def test_repeats_are_the_call_itself():
    repeated, called = Step(), Step()
    for seed in range(3):
        for step in (repeated, called):
            step.new_gradients(seed)
        assert repeated.repeated.holds()
        repeated.repeated.run(OPTIONS)
        with torch.no_grad():
            grads = [called.values.grad, called.parameters[1].grad]
            gk.masked_adam_(**{**called.lists, "grads": grads}, **OPTIONS._asdict())
        for a, b in zip(repeated.tensors(), called.tensors(), strict=True):
            assert same_bits(a.detach(), b.detach())
    assert repeated.noted == [repeated.values._version]
    assert [p._version for p in repeated.parameters] == [3, 3]


CHANGES = {
    "a dict's entry": lambda s: s.held.update(weight=nn.Parameter(s.parameters[0].detach().clone())),
    "a dict's entry is gone": lambda s: s.held.clear(),
    "a state's tensor": lambda s: s.states[0].update(exp_avg=s.states[0]["exp_avg"].clone()),
    "a list's entry": lambda s: s.group["params"].__setitem__(1, s.parameters[0]),
    "a longer list": lambda s: s.group["params"].append(s.parameters[0]),
    "other memory of a weight": lambda s: setattr(s.parameters[0], "data", s.parameters[0].data.clone()),
    "a weight's strides": lambda s: setattr(s.parameters[1], "data", s.parameters[1].data.t().contiguous().t()),
    "a weight's dtype": lambda s: setattr(s.parameters[1], "data", s.parameters[1].data.to(torch.bfloat16)),
    "another shape at the same address": lambda s: s.lists["weights"][1].resize_(5, 6),
    "a moment is resized": lambda s: s.states[1]["exp_avg"].resize_(100, 100),
    "a moment's memory": lambda s: s.states[1]["exp_avg_sq"].set_(torch.zeros(6, 2)),
    "an index's memory": lambda s: s.lists["indices"][0].set_(torch.zeros(6, 2, dtype=torch.int32)),
    "swapped tensors": lambda s: torch.utils.swap_tensors(s.lists["weights"][1], torch.zeros(6, 5)),
    "the version of values": lambda s: s.values.detach().add_(1),
    "no gradient": lambda s: setattr(s.values, "grad", None),
    "a gradient's dtype": lambda s: s.parameters[1].grad.__setattr__("data", s.parameters[1].grad.double()),
    "a gradient's strides": lambda s: setattr(s.parameters[1], "grad", torch.zeros(5, 6).t()),
    "a sparse gradient": lambda s: setattr(s.parameters[1], "grad", torch.zeros(6, 5).to_sparse()),
    "a gradient that was None": lambda s: setattr(s.without, "grad", torch.zeros(3)),
    "a weight without memory": lambda s: s.lists["weights"][0].untyped_storage().resize_(0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(change):
    step = Step()
    if change == "a weight's strides" or change.startswith(("other memory", "a weight's dtype")):
        # The call has to know the parameter itself, not the alias that detach() made of it.
        step.lists["weights"] = step.parameters
        step.repeated = RepeatedAdam(
            {**step.lists, "grads": [step.values.grad, step.parameters[1].grad]},
            [Source(step.values), Source(step.parameters[1])], [], [], [], [],
        )  # fmt: skip
    assert step.repeated.holds()
    CHANGES[change](step)
    step.parameters[0].__dict__.clear()
    assert not step.repeated.holds()
    assert not step.repeated.holds()


def test_weights_that_nobody_notes_may_be_written_by_anybody():
    step = Step()
    with torch.no_grad():
        step.parameters[1].mul_(2)
    assert step.repeated.holds()


def test_gradients_that_have_to_be_converted():
    """A compact gradient that is not contiguous is copied in every step."""
    step = Step()
    step.values.grad = torch.randn(2, 6).t()
    lists = {**step.lists, "grads": [step.values.grad.contiguous(), step.parameters[1].grad]}
    source = Source(step.values, torch.Tensor.contiguous)
    repeated = RepeatedAdam(lists, [source, Source(step.parameters[1])], [], [], [], [])
    step.values.grad = torch.ones(2, 6).t()
    assert repeated.holds()
    repeated.run(OPTIONS)
    assert torch.allclose(step.states[0]["exp_avg"], torch.full((6, 2), 0.1))


def test_a_view_of_a_gradient_is_found_at_its_offset():
    step = Step()
    wide = nn.Parameter(torch.zeros(6, 7))
    wide.grad = torch.randn(6, 7)
    lists = {**step.lists, "grads": [step.values.grad, wide.grad[:, 2:]]}
    repeated = RepeatedAdam(lists, [Source(step.values), Source(wide)], [], [], [], [])
    wide.grad = torch.randn(6, 7)
    assert repeated.holds()
    repeated.run(OPTIONS)
    assert torch.allclose(step.states[1]["exp_avg"], 0.1 * wide.grad[:, 2:4])


def test_the_scaler():
    step = Step()
    before = step.parameters[1].detach().clone()
    assert step.repeated.holds()
    step.repeated.run(OPTIONS, torch.tensor(2.0), torch.tensor(1.0))
    assert torch.equal(step.parameters[1], before)
    with pytest.raises(ValueError, match="grad_scale must be one float32 on cpu"):
        step.repeated.run(OPTIONS, torch.tensor(2.0, dtype=torch.float64))


def test_bad_indices_change_nothing():
    step = Step()
    step.lists["indices"][1][0, 0] = 5
    before = [t.detach().clone() for t in step.tensors()]
    assert step.repeated.holds()
    with pytest.raises(IndexError, match="tensor 1: indices must lie in 0 to 4, found 0 to 5"):
        step.repeated.run(OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(step.tensors(), before, strict=True))
    assert step.noted == [step.values._version]


def test_what_cannot_be_described_is_refused():
    step = Step()
    watch = native.module().Watch()
    for bad in (lambda: watch.link([], 0, 0), lambda: watch.list({}), lambda: watch.state(3)):
        with pytest.raises(TypeError):
            bad()
    with torch.inference_mode():
        inference = torch.zeros(3)
    with pytest.raises(RuntimeError, match="nference tensor"):
        watch.written(inference, [0], 0)
    with pytest.raises(TypeError, match="gradient"):
        watch.grad(step.without, 0, 0)


def test_modes_and_other_backends_see_the_operator():
    from torch.utils._python_dispatch import TorchDispatchMode

    cpu = torch.device("cpu")
    assert can_repeat(cpu)
    with TorchDispatchMode():
        assert not can_repeat(cpu)
    with gk.use_backend("reference"):
        assert not can_repeat(cpu)


def test_cycles_are_collected():
    """A hook on a parameter may hold the optimizer that holds the description."""
    step = Step()
    step.parameters[0].owner = step
    step.held["owner"] = step
    alive = weakref.ref(step)
    del step
    gc.collect()
    assert alive() is None


def test_gradients_are_not_kept_alive():
    step = Step()
    assert step.repeated.holds()
    step.repeated.run(OPTIONS)
    grad = weakref.ref(step.parameters[1].grad)
    step.parameters[1].grad = None
    assert grad() is None
