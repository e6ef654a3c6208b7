"""The autograd functions against torch's own layers: values, gradients, what they keep and what they allocate."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import gradsel_kernels as gk
from gradsel.masks import Flat, Mask, PerRow, WholeColumns, WholeRows
from gradsel.masks.weight_grad import COPIED_SHARE, Taps
from gradsel.nn import functional
from gradsel.views import NeuronView


def masks_of(shape: tuple[int, ...], view: NeuronView | None = None, seed: int = 0) -> dict[str, Mask]:
    """One mask of every kind, and a per-row mask that uses few columns."""
    view = view or NeuronView()
    generator = torch.Generator().manual_seed(seed)
    rows, n = view.shape(shape)
    few = max(1, n // 4)

    def some(count: int, of: int) -> Tensor:
        return torch.randperm(of, generator=generator)[:count].sort().values.to(torch.int32)

    def per_row(of: int) -> Tensor:
        return torch.stack([some(min(2, of), of) for _ in range(rows)])

    return {
        "per-row": PerRow(per_row(n), shape, view),
        "per-row, few columns": PerRow(per_row(few), shape, view),
        "whole width": PerRow(torch.arange(n, dtype=torch.int32).expand(rows, -1), shape, view),
        "rows": WholeRows(some(2, rows), shape, view),
        "columns": WholeColumns(some(min(2, n), n), shape, view),
        "irregular": Flat.from_dense(torch.rand(shape, generator=generator) < 0.2),
        "one entry": Flat(torch.tensor([rows * n - 1]), shape),
    }


KINDS = list(masks_of((3, 4)))


def written(weight: Tensor, mask: Mask, values: Tensor) -> Tensor:
    """The weight with ``values`` written into it, so that finite differences of the values reach the output."""
    weight = weight.detach().clone()
    mask.scatter_(weight, values.detach())
    return weight


def double(*shape: int, requires_grad: bool = True) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=requires_grad)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transposed", [False, True], ids=["Linear", "Conv1D"])
def test_gradcheck_linear(kind, transposed):
    view = NeuronView((1,)) if transposed else NeuronView()
    weight = double(*((9, 5) if transposed else (5, 9)), requires_grad=False)
    mask = masks_of(tuple(weight.shape), view)[kind]
    product = mask.product(view)

    def function(input, bias, values):
        own = written(weight, mask, values)
        return functional.linear(input, own.t() if transposed else own, bias, values, product)

    values = mask.gather(weight).requires_grad_()
    for shape in [(9,), (4, 9), (2, 3, 9)]:
        assert torch.autograd.gradcheck(function, (double(*shape), double(5), values))
    assert torch.autograd.gradcheck(lambda input, values: function(input, None, values), (double(2, 3, 9), values))


CONVOLUTIONS = {
    "1x1": nn.Conv2d(4, 6, 1),
    "3x3": nn.Conv2d(3, 4, 3, padding=1),
    "patches": nn.Conv2d(3, 5, 2, stride=2),
    "stride, padding, dilation": nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2)),
    "groups": nn.Conv2d(4, 6, 3, groups=2, padding=1, bias=False),
    "depthwise": nn.Conv2d(4, 4, 3, groups=4, padding=1),
    "1d": nn.Conv1d(3, 4, 3, stride=2, padding=1),
    "3d": nn.Conv3d(2, 3, 2, padding=1, dilation=2),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_gradcheck_convolutions(name, kind, monkeypatch):
    layer = CONVOLUTIONS[name].double()
    weight = layer.weight.detach()
    mask = masks_of(tuple(weight.shape))[kind]
    product = mask.product(NeuronView(), layer.groups, share=1.0)
    taps = Taps.of(product, layer.in_channels, layer.kernel_size, weight.device)
    how = (layer.stride, layer.padding, layer.dilation, layer.groups)

    def function(input, values, *bias):
        own = written(weight, mask, values)
        return functional.conv(input, own, bias[0] if bias else None, values, product, taps, *how)

    inputs = [double(2, layer.in_channels, *(5, 4, 3)[: weight.ndim - 2]), mask.gather(weight).requires_grad_()]
    inputs += [] if layer.bias is None else [layer.bias.detach().clone().requires_grad_()]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    output = function(*inputs)
    assert torch.equal(output, layer._conv_forward(inputs[0], weight, inputs[2] if len(inputs) > 2 else None))

    def grads():
        return torch.autograd.grad(function(*inputs).square().sum(), inputs)

    expected = grads()
    monkeypatch.setattr(functional, "TAP_BYTES", 1)  # one image at a time
    for once, cut in zip(expected, grads(), strict=True):
        torch.testing.assert_close(once, cut)
    without_batch = torch.autograd.grad(function(inputs[0][0], *inputs[1:]).sum(), inputs[1:])
    with_batch = torch.autograd.grad(function(inputs[0][:1], *inputs[1:]).sum(), inputs[1:])
    for one, other in zip(without_batch, with_batch, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding_idx", [None, 2])
def test_gradcheck_embedding(kind, padding_idx):
    weight = double(6, 4, requires_grad=False)
    mask = masks_of((6, 4))[kind]
    lookup = mask.lookup()
    tokens = torch.tensor([[0, 5, 5], [3, 1, 4]])  # without the padding, whose entries get no gradient

    def function(values):
        return functional.embedding(tokens, written(weight, mask, values), values, lookup, padding_idx)

    values = mask.gather(weight).requires_grad_()
    assert torch.autograd.gradcheck(function, (values,))
    negative = functional.embedding(torch.tensor([2]), weight, values, lookup, -4)
    assert not torch.autograd.grad(negative.sum(), values)[0].any()
    tokens = torch.tensor([2, 2, 5, 0])
    weight.requires_grad_()
    F.embedding(tokens, weight, padding_idx).square().sum().backward()
    function(values).square().sum().backward()
    torch.testing.assert_close(values.grad, mask.gather(weight.grad), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_harvest(kind):
    weight = double(5, 9, requires_grad=False)
    mask = masks_of((5, 9))[kind]

    def function(values):
        return functional.harvest(written(weight, mask, values), values, mask).square()

    assert torch.autograd.gradcheck(function, (mask.gather(weight).requires_grad_(),))


# --- What forward keeps, what backward allocates -----------------------------------------------------------------


def kept_bytes(function, *owned: Tensor) -> int:
    """Bytes that autograd saves, counting each storage once and leaving out what the layer ``owns``."""
    known = {tensor.untyped_storage().data_ptr() for tensor in owned}
    found: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function()
    del output
    return sum(found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_layer_keeps_the_used_columns_only(dtype):
    tokens, n, rows = 50, 40, 24
    weight = torch.randn(rows, n, dtype=dtype)
    for kind, mask in masks_of((rows, n)).items():
        product = mask.product(NeuronView())
        values = mask.gather(weight).float().requires_grad_()
        input = torch.randn(tokens, n, dtype=dtype, requires_grad=True)
        found = kept_bytes(lambda: functional.linear(input, weight, None, values, product), weight)  # noqa: B023
        used = mask.used_columns().numel()
        predicted = used if used <= COPIED_SHARE * n else n
        assert found == tokens * predicted * weight.element_size()
        if kind == "per-row, few columns":
            assert used == n // 4


@pytest.mark.parametrize("kind", ["per-row", "per-row, few columns"])
def test_a_product_has_no_columns_of_its_own(kind):
    """Also where both have moved."""
    mask, meta = masks_of((24, 40))[kind], torch.device("meta")
    product = mask.product(NeuronView())
    assert product.cols is mask.cols
    there = mask.cols.to(meta)
    moved = product.to(meta, [(mask.cols, there)])
    assert moved.cols is there
    assert (moved.used is None) == (moved.places is None) == (kind == "per-row")
    assert moved.used is None or (moved.used.is_meta and moved.places.is_meta)


def test_a_convolution_keeps_the_smallest_of_taps_channels_and_input():
    weight = torch.randn(6, 8, 3, 3)
    input = torch.randn(2, 8, 12, 12, requires_grad=True)

    def kept(cols: list[int], **how) -> int:
        mask = WholeColumns(torch.tensor(cols, dtype=torch.int32), weight.shape)
        product = mask.product(NeuronView(), share=1.0)
        taps = Taps.of(product, 8, (3, 3), weight.device)
        values = mask.gather(weight).requires_grad_()
        geometry = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1, **how}
        return kept_bytes(lambda: functional.conv(input, weight, None, values, product, taps, **geometry), weight)

    plane = 2 * 144 * 4
    assert kept([0]) == plane  # a tap
    assert kept([0, 1, 2, 3]) == plane  # four taps of one channel: the channel
    assert kept([0, 1, 9, 10]) == 2 * plane
    assert kept(list(range(72))) == 8 * plane  # everything: the input
    assert kept([0, 9, 18, 27, 36]) == 8 * plane  # more than half of it
    assert kept([0, 1, 2], stride=(3, 3)) == 3 * 2 * 16 * 4  # with a stride, taps are small


def test_an_embedding_keeps_the_token_numbers():
    weight = torch.randn(30, 8)
    mask = masks_of((30, 8))["rows"]
    values = mask.gather(weight).requires_grad_()
    tokens = torch.randint(0, 30, (7,))
    found = kept_bytes(lambda: functional.embedding(tokens, weight, values, mask.lookup()), weight)
    assert found == tokens.untyped_storage().nbytes()


class Largest(TorchDispatchMode):
    """The largest tensor that any operator returns, in elements, new storage or not."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result

    def watch(self, function, *known: Tensor) -> int:
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        with self:
            function()
        return self.elements


def largest_allocation(function) -> int:
    """Bytes of the largest block that torch's allocator gives out, inside operators too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    return max(event.nbytes() for event in events if event.name() == "[memory]")


@pytest.mark.parametrize("kind", ["per-row", "per-row, few columns", "rows", "columns", "irregular"])
def test_backward_allocates_nothing_of_the_weights_size(kind):
    tokens, rows, n = 16, 640, 512
    weight = torch.randn(rows, n)
    mask = masks_of((rows, n))[kind]
    if kind == "irregular":
        mask = Flat.from_dense(torch.rand(rows, n) < 0.01)
    product = mask.product(NeuronView())
    bias = torch.zeros(rows, requires_grad=True)
    for run in ("operators", "allocator"):
        input = torch.randn(tokens, n, requires_grad=True)
        values = mask.gather(weight).requires_grad_()
        output = functional.linear(input, weight, bias, values, product)
        grad = torch.randn_like(output)

        def backward(output=output, grad=grad):
            output.backward(grad)

        if run == "operators":
            assert Largest().watch(backward, weight) < rows * n / 2
        else:
            assert largest_allocation(backward) < 4 * rows * n / 2
        assert values.grad is not None
    dense = nn.Parameter(weight)
    output = F.linear(torch.randn(tokens, n), dense)
    dense_backward = output.sum().backward  # both measurements do notice a dense gradient
    assert Largest().watch(lambda: dense_backward(retain_graph=True), weight) >= rows * n
    assert largest_allocation(dense_backward) >= 4 * rows * n


@pytest.mark.parametrize("kind", ["per-row", "rows", "columns", "one entry"])
def test_backward_of_a_convolution_allocates_nothing_of_the_weights_size(kind):
    weight = torch.randn(48, 48, 3, 3)
    mask = masks_of(tuple(weight.shape))[kind]
    product = mask.product(NeuronView(), share=1.0)
    taps = Taps.of(product, 48, (3, 3), weight.device)
    values = mask.gather(weight).requires_grad_()
    how = ((1, 1), (1, 1), (1, 1), 1)
    output = functional.conv(torch.randn(1, 48, 4, 4), weight, None, values, product, taps, *how)
    assert largest_allocation(output.sum().backward) < 4 * weight.numel() / 2
    dense = weight.requires_grad_()
    output = F.conv2d(torch.randn(1, 48, 4, 4), dense, padding=1)
    assert largest_allocation(output.sum().backward) >= 4 * weight.numel()


@pytest.mark.parametrize("kind", ["per-row", "rows", "columns", "one entry"])
def test_backward_of_an_embedding_allocates_nothing_of_the_weights_size(kind):
    weight = torch.randn(1000, 64)
    mask = masks_of((1000, 64))[kind]
    values = mask.gather(weight).requires_grad_()
    output = functional.embedding(torch.randint(0, 1000, (20,)), weight, values, mask.lookup())
    assert largest_allocation(output.sum().backward) < 4 * weight.numel() / 2


# --- Modes and errors --------------------------------------------------------------------------------------------


def layer(kind: str = "per-row", dtype: torch.dtype = torch.float32):
    weight = torch.randn(6, 10, dtype=dtype)
    mask = masks_of((6, 10))[kind]
    return weight, mask, mask.product(NeuronView()), mask.gather(weight).float().requires_grad_()


def test_without_gradients_it_is_the_torch_function():
    weight, _, product, values = layer()
    input = torch.randn(3, 10, requires_grad=True)
    with torch.no_grad():
        assert not functional.linear(input, weight, None, values, product).requires_grad
    frozen = functional.linear(input, weight, None, values.detach(), product)
    assert type(frozen.grad_fn) is type(F.linear(input, weight).grad_fn)
    with torch.no_grad():
        assert functional.harvest(weight, values, layer()[1]) is weight


def test_a_second_derivative_is_an_error():
    weight, _, product, values = layer()
    input = torch.randn(3, 10, requires_grad=True)

    def loss(input: Tensor) -> Tensor:
        return functional.linear(input, weight, None, values, product).square().sum()

    with pytest.raises(RuntimeError, match=r"create_graph=True.*gradsel\.detach\(model\)"):
        torch.autograd.grad(loss(input), values, create_graph=True)
    with pytest.raises(RuntimeError, match=r"create_graph=True.*gradsel\.detach\(model\)"):  # once a part was missing
        torch.autograd.functional.hvp(loss, input, input)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_that_of_torch(dtype):
    weight, mask, product, values = layer()
    dense = weight.clone().requires_grad_()
    input = torch.randn(4, 10, requires_grad=True)
    other = input.detach().clone().requires_grad_()
    with torch.autocast("cpu", dtype):
        output = functional.linear(input, weight, None, values, product)
        expected = F.linear(other, dense)
    assert output.dtype is dtype
    assert torch.equal(output, expected)
    grad = torch.randn_like(output)
    output.backward(grad)
    expected.backward(grad)
    assert input.grad.dtype is values.grad.dtype is torch.float32
    assert torch.equal(input.grad, other.grad)
    truth = grad.double().t() @ other.detach().to(dtype).double()
    error = (values.grad - mask.gather(truth)).abs().max()
    assert error <= (mask.gather(dense.grad) - mask.gather(truth)).abs().max() + 1e-6


def test_the_output_may_be_changed_in_place():
    weight, mask, product, values = layer()
    for shape in [(10,), (3, 10), (2, 3, 10)]:
        input = torch.randn(shape)
        output = functional.linear(input, weight, torch.zeros(6), values, product)
        (grad,) = torch.autograd.grad(output.relu_().sum(), values)
        dense = weight.clone().requires_grad_()
        (expected,) = torch.autograd.grad(F.linear(input, dense).relu().sum(), dense)
        torch.testing.assert_close(grad, mask.gather(expected))


@pytest.mark.parametrize("strategy", ["reference", None])
def test_layers_use_the_backend_in_use(strategy):
    weight, mask, product, values = layer()
    input = torch.randn(5, 10)
    with gk.use_backend(strategy):
        functional.linear(input, weight, None, values, product).square().sum().backward()
    expected = 2 * F.linear(input, weight).t() @ input
    torch.testing.assert_close(values.grad, mask.gather(expected))
