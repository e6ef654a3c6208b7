"""Memory: what operators and steps take beyond their results, and tensors of more than 2**31 entries."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn

import gradsel
import gradsel_kernels as gk
from gradsel.masks import PerRow, Whole
from gradsel_kernels import Layout, reference
from gradsel_kernels._checks import words
from tests.gpu import ON_CPU, WORKSPACE, peak_of
from tests.kernels import cases

WIDTH = 2048 if ON_CPU else 8192
TOKENS = 32
SLACK = 2**16 if ON_CPU else WORKSPACE

# --- What an operator takes --------------------------------------------------------------------------------------


def matrix(device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(WIDTH, WIDTH, device=device).to(dtype)


def four_a_row(device: str) -> Tensor:
    """int32 [WIDTH, 4], ascending."""
    quarter = WIDTH // 4
    first = torch.randint(0, quarter, (WIDTH, 1), dtype=torch.int32, device=device)
    return first + quarter * torch.arange(4, dtype=torch.int32, device=device)


@pytest.mark.parametrize("k", [1, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_top_k_takes_its_results(kernels, device, dtype, k):
    grad = matrix(device, dtype)
    gk.topk_rows(grad, k), gk.topk_rows_bits(grad, k)
    results = 4 * WIDTH * k
    assert peak_of(device, lambda: gk.topk_rows(grad, k)) <= results + SLACK
    assert peak_of(device, lambda: gk.topk_rows_bits(grad, k)) <= results + 4 * WIDTH * words(WIDTH) + SLACK


@pytest.mark.parametrize("k", [1, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_first_step_takes_its_results(kernels, device, dtype, k):
    """Columns, two moments, and packed masks."""
    weight, grad = matrix(device, dtype), matrix(device, dtype)

    def run() -> None:
        gk.topk_masked_adam_([weight], [grad], k, lr=0.1)

    run()
    assert peak_of(device, run) <= 12 * WIDTH * k + 4 * WIDTH * words(WIDTH) + SLACK


@pytest.mark.parametrize("layout", [Layout.COLS, Layout.FLAT], ids=lambda layout: layout.name)
def test_a_step_takes_nothing(kernels, device, layout):
    weight, grad = matrix(device, torch.bfloat16), matrix(device, torch.bfloat16)
    index = four_a_row(device)
    shape = (WIDTH, 4) if layout == Layout.COLS else (WIDTH * 4,)
    if layout == Layout.FLAT:
        index = (torch.arange(WIDTH, device=device).unsqueeze(1) * WIDTH + index).view(-1)
    m, v = (torch.zeros(shape, device=device) for _ in range(2))
    count = torch.zeros((), device=device)

    def run() -> None:
        gk.masked_adam_([weight], [grad], [m], [v], [count], lr=0.1, indices=[index], layouts=[layout])

    run()
    assert peak_of(device, run) <= SLACK


@pytest.mark.parametrize("strategy", ["auto", "gather", "tile"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_selected_gradient_takes_its_results(kernels, device, dtype, strategy):
    """Twice, where the tokens are shared out: sums of each share, and their sum. A hundredth of the dense gradient."""
    x, dy = (torch.randn(512, WIDTH, device=device).to(dtype) for _ in range(2))
    cols = four_a_row(device)
    dense, results = 4 * WIDTH * WIDTH, 4 * WIDTH * (4 + 1)
    gk.selected_weight_grad_bias(dy, x, cols, strategy)
    peak = peak_of(device, lambda: gk.selected_weight_grad_bias(dy, x, cols, strategy))
    if ON_CPU:  # where dense tiles are panels, a quarter of the weight at most
        assert peak < dense
    else:
        assert peak <= 3 * results + SLACK < dense / 100


def attached_layer(device: str):
    torch.manual_seed(0)
    model = nn.Linear(WIDTH, WIDTH).to(device)
    shape = (WIDTH, WIDTH)
    gradsel.attach(model, gradsel.Selection({"weight": PerRow(four_a_row(device), shape), "bias": Whole((WIDTH,))}))
    return model, gradsel.MaskedAdam(gradsel.trainable_parameters(model), lr=1e-3)


def test_an_attached_step_forms_no_dense_gradient(kernels, device):
    weight = 4 * WIDTH * WIDTH
    x = torch.randn(TOKENS, WIDTH, device=device, requires_grad=True)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = attached_layer(device)
    for _ in range(2):
        step(model, optimizer)
    assert peak_of(device, lambda: step(model, optimizer)) < weight / 4
    gradsel.detach(model)
    dense = torch.optim.Adam(model.parameters())
    for _ in range(2):
        step(model, dense)
    assert peak_of(device, lambda: step(model, dense)) >= weight  # this measure does see dense gradients


# --- More than 2**31 entries -------------------------------------------------------------------------------------

ROWS, COLUMNS = (2**12 if ON_CPU else 2**20) + 37, 2100
EDGE = min(2**31 // COLUMNS, ROWS - 2)
GIB_NEEDED = 16


large_ones = pytest.mark.xdist_group("large")


@pytest.fixture
def room(kernels, device):
    """Its tests have the mark xdist_group: where tests run at the same time, these do not."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0] / 2**30
        if free < GIB_NEEDED:
            pytest.skip(f"{free:.0f} GiB of device memory are free, and {GIB_NEEDED} are needed")
    yield
    if device == "cuda":
        torch.cuda.empty_cache()


def large(device: str, rows: int = ROWS, cols: int = COLUMNS) -> Tensor:
    tensor = torch.empty(rows, cols, dtype=torch.bfloat16, device=device)
    for part in tensor.split(2**16):
        part.normal_()
    return tensor


def sample(device: str) -> Tensor:
    """Some rows, those around entry 2**31 and the last one among them."""
    some = torch.cat([torch.tensor([0, 1, EDGE - 1, EDGE, EDGE + 1, ROWS - 1]), torch.randint(0, ROWS, (500,))])
    return some.unique().to(device)


def two_a_row(device: str) -> Tensor:
    first = torch.randint(0, COLUMNS // 2, (ROWS, 1), dtype=torch.int32, device=device)
    return torch.cat([first, first + COLUMNS // 2], 1)


def equal_in_parts(left: Tensor, right: Tensor) -> bool:
    return all(cases.same_bits(a, b) for a, b in zip(left.split(2**16), right.split(2**16), strict=True))


@large_ones
def test_top_k_past_two_to_the_31(room, device):
    grad, rows = large(device), sample(device)
    assert ON_CPU or grad.numel() > 2**31
    for k in (4, 40):
        cols, bits = gk.topk_rows_bits(grad, k)
        expected = reference.topk_rows_bits(grad[rows].cpu(), k)
        assert torch.equal(cols[rows].cpu(), expected[0])
        assert torch.equal(bits[rows].cpu(), expected[1])
        assert torch.equal(gk.topk_rows(grad, k), cols)


@large_ones
def test_gather_and_scatter_past_two_to_the_31(room, device):
    weight, rows, cols = large(device), sample(device), two_a_row(device)
    backup = weight.clone()
    values = gk.gather_rows(weight, cols)
    assert cases.same_bits(values[rows].cpu(), weight[rows].cpu().gather(1, cols[rows].cpu().long()))
    gk.scatter_rows_(weight, cols, values + 1)
    expected = backup[rows].cpu().scatter_(1, cols[rows].cpu().long(), (values + 1)[rows].cpu())
    assert torch.equal(weight[rows].cpu(), expected)
    gk.scatter_rows_(weight, cols, values)
    assert equal_in_parts(weight, backup)


@large_ones
def test_masks_past_two_to_the_31(room, device):
    mask, rows = torch.empty(ROWS, COLUMNS, dtype=torch.bool, device=device), sample(device)
    for part in mask.split(2**16):
        part.copy_(torch.rand(part.shape, device=device) < 0.1)
    bits = gk.pack_bits(mask)
    assert torch.equal(bits[rows].cpu(), reference.pack_bits(mask[rows].cpu()))
    assert equal_in_parts(gk.unpack_bits(bits, COLUMNS), mask)


@large_ones
@pytest.mark.parametrize("layout", [Layout.COLS, Layout.FLAT], ids=lambda layout: layout.name)
def test_a_step_past_two_to_the_31(room, device, layout):
    """Against the same step on a sample of the rows on the CPU; all other entries keep their bits."""
    weight, grad, rows = large(device), large(device), sample(device)
    backup = weight.clone()
    cols = two_a_row(device)
    if layout == Layout.COLS:
        index, own = cols, rows
    else:
        index = (rows.unsqueeze(1) * COLUMNS + cols[rows]).view(-1)
        assert ON_CPU or int(index.max()) > 2**31
        own = torch.arange(rows.numel(), device=device)

    def state(shape, where: str) -> list[Tensor]:
        return [torch.zeros(shape, device=where), torch.zeros(shape, device=where), torch.zeros((), device=where)]

    m, v, count = state(index.shape, device)
    arguments = {"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True}
    gk.masked_adam_([weight], [grad], [m], [v], [count], indices=[index], layouts=[layout], **arguments)
    twin, few = backup[rows].cpu(), cols[rows].cpu()
    expected = state(few.shape, "cpu")
    with gk.use_backend("native"):
        gk.masked_adam_(
            [twin], [grad[rows].cpu()], expected[:1], expected[1:2], expected[2:],
            indices=[few], layouts=[Layout.COLS], **arguments,
        )  # fmt: skip
    assert cases.same_bits(weight[rows].cpu(), twin)
    for found, moment in zip((m, v), expected, strict=False):
        assert cases.same_bits(found.view(-1, 2)[own].cpu(), moment)
    assert float(count) == 1
    gk.scatter_rows_(weight, cols, gk.gather_rows(backup, cols))
    assert equal_in_parts(weight, backup)


@large_ones
@pytest.mark.parametrize("strategy", ["gather", "tile"])
def test_a_selected_gradient_past_two_to_the_31(room, device, strategy):
    tokens, width, rows = (2**10 if ON_CPU else 2**18) + 3, 8200, 16
    x, dy = large(device, tokens, width), large(device, tokens, rows)
    assert ON_CPU or x.numel() > 2**31
    cols = cases.random_cols(rows, width, 2).to(device)
    found = gk.selected_weight_grad(dy, x, cols, strategy)
    used = x[:, cols.view(-1).long()].cpu().double().view(tokens, rows, 2)
    products = used * dy.cpu().double().unsqueeze(2)
    error = (found.cpu().double() - products.sum(0)).abs()
    assert (error <= 1e-6 * products.abs().sum(0)).all()
    taken = gk.take_columns(x, cols.view(-1))
    assert cases.same_bits(taken, x[:, cols.view(-1).long()].mT.contiguous())
