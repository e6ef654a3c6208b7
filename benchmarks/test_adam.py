"""One optimizer step: ours on a mask, against dense Adam in all of torch's implementations.

Every provider trains its own copy of the weights, so none finds another's data in a cache.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradsel
import gradsel_kernels as gk
from gradsel.masks import PerRow
from gradsel.ranking.policies import Scores
from gradsel.views import NeuronView

try:  # a peer that takes part where it is installed
    import bitsandbytes
except ImportError:
    bitsandbytes = None

LINE = 64  # bytes that the memory moves for one scattered access on a CPU
SHAPES = [(768, 768), *[(2304, 768), (768, 768), (3072, 768), (768, 3072)] * 12]


def vit(width: int = 1) -> list[tuple[str, nn.Parameter]]:
    """ViT-B/16's matrices, patch embedding included; ``width`` multiplies their columns."""
    named = []
    for i, (rows, cols) in enumerate(SHAPES):
        parameter = nn.Parameter(torch.randn(rows, cols * width))
        parameter.grad = torch.randn_like(parameter)
        named.append((f"matrix{i}", parameter))
    return named


def random_selection(named, k: int) -> gradsel.Selection:
    return gradsel.Selection(
        {name: PerRow(gk.topk_rows(torch.randn(p.shape), k), p.shape) for name, p in named}, {"policy": f"random {k}"}
    )


def masked(k: int, width: int = 1):
    named = vit(width)
    selection = random_selection(named, k)
    return gradsel.MaskedAdam(named.copy(), masks=selection), selection.trainable_count()


def attached(k: int) -> tuple[nn.Module, gradsel.MaskedAdam]:
    """An attached model and its optimizer, which writes the values to the weights for as long as the model lives."""
    model = nn.ModuleList(nn.Linear(cols, rows, bias=False) for rows, cols in SHAPES)
    gradsel.attach(model, random_selection(list(model.named_parameters()), k))
    parameters = gradsel.trainable_parameters(model)
    for values in parameters:
        values.grad = torch.randn_like(values)
    return model, gradsel.MaskedAdam(parameters)


def other_dense(k: int, weights: int) -> dict:
    """torch's other implementations, and those of bitsandbytes, once: what they take does not depend on K."""
    if k > 1:
        return {}
    made = {
        "torch Adam(foreach), dense": torch.optim.Adam([p for _, p in vit()], foreach=True),
        "torch Adam(single), dense": torch.optim.Adam([p for _, p in vit()], foreach=False),
    }
    if bitsandbytes is not None:
        made["bitsandbytes Adam, dense"] = bitsandbytes.optim.Adam([p for _, p in vit()])
        made["bitsandbytes Adam8bit, dense"] = bitsandbytes.optim.Adam8bit([p for _, p in vit()])
    return {name: (adam.step, (16 if "8bit" in name else 28) * weights) for name, adam in made.items()}


@pytest.mark.parametrize("k", [1, 2, 5, 10])
def test_step(compare, k):
    torch.manual_seed(0)
    weights = sum(rows * cols for rows, cols in SHAPES)
    dense = torch.optim.Adam([p for _, p in vit()], fused=True)

    published_named = vit()
    published = torch.optim.Adam([p for _, p in published_named], fused=True)
    dense_masks = [mask.to_dense().float() for mask in random_selection(published_named, k).values()]

    def mask_then_step():
        for (_, parameter), mask in zip(published_named, dense_masks, strict=True):
            parameter.grad.mul_(mask)
        published.step()

    ours, nnz = masked(k)
    bound_named = vit()
    bound_cols = [mask.cols for mask in random_selection(bound_named, k).values()]

    def gather_only():
        """For scale: reading every selected weight and gradient once, and nothing else, by two calls a matrix."""
        for (_, parameter), cols in zip(bound_named, bound_cols, strict=True):
            gk.gather_rows(parameter.detach(), cols)
            gk.gather_rows(parameter.grad, cols)

    compact_values = [nn.Parameter(torch.randn(rows, k)) for rows, _ in SHAPES]
    for values in compact_values:
        values.grad = torch.randn_like(values)
    compact = gradsel.MaskedAdam(compact_values)
    model, of_model = attached(k)
    weight = next(model.parameters())
    before = weight.clone()
    of_model.step()
    assert not torch.equal(weight, before)
    per_entry = 4 * 4 + 4 + LINE + 2 * LINE  # moments read and written, index, gradient read, weight read and written
    compare(
        "masked_adam_",
        "ViT-B/16, 86 M",
        "float32",
        k,
        {
            "torch Adam(fused), dense": (dense.step, 28 * weights),
            **other_dense(k, weights),
            "dense mask, then torch Adam(fused)": (mask_then_step, (28 + 12) * weights),
            "gather_rows of weights and gradients": (gather_only, (4 + 4 + 2 * LINE) * nnz),
            "native, compact gradient and values": (compact.step, 28 * nnz),
            "native, attached": (of_model.step, (28 + 2 * LINE) * nnz),
            "native": (ours.step, per_entry * nnz),
        },
    )


@pytest.mark.parametrize("k", [1, 10])
def test_cost_does_not_depend_on_the_size_of_the_model(compare, k):
    """Twice the columns at the same number of selected entries."""
    torch.manual_seed(0)
    twice, nnz = masked(k, width=2)
    once, same = masked(k)
    assert nnz == same
    flush = torch.zeros(2**25)
    per_entry = 4 * 4 + 4 + 3 * LINE
    compare(
        "masked_adam_, twice the model",
        "ViT-B/16, 86 M",
        "float32",
        k,
        {
            "native, 172 M weights": (twice.step, per_entry * nnz),
            "memory written in between": (lambda: flush.add_(1), 2 * flush.nbytes),
            "native": (once.step, per_entry * nnz),
        },
    )


# --- bfloat16: two layers of Llama-3.2-1B ---------------------------------------------------------------------------

LLAMA = [(2048, 2048), (512, 2048), (512, 2048), (2048, 2048), (8192, 2048), (8192, 2048), (2048, 8192)] * 2


def llama() -> list[tuple[str, nn.Parameter]]:
    named = []
    for i, shape in enumerate(LLAMA):
        parameter = nn.Parameter(torch.randn(shape, dtype=torch.bfloat16))
        parameter.grad = torch.randn_like(parameter)
        named.append((f"matrix{i}", parameter))
    return named


class DenseMasters:
    """Mixed precision as usual: float32 copies of all weights, dense Adam on them, rounded back."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.masters = [nn.Parameter(parameter.detach().float()) for parameter in parameters]
        self.adam = torch.optim.Adam(self.masters, fused=True)

    @torch.no_grad()
    def step(self) -> None:
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            master.grad = parameter.grad.float()
        self.adam.step()
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            parameter.copy_(master)


@pytest.mark.parametrize(
    "policy", [*map(gradsel.PerNeuron, (1, 2, 5, 10)), gradsel.Rows(3)], ids=lambda policy: str(policy)
)
def test_low_precision(compare, policy):
    torch.manual_seed(0)
    weights = sum(rows * cols for rows, cols in LLAMA)
    dense = torch.optim.Adam([p for _, p in llama()], fused=True)
    masters = DenseMasters([p for _, p in llama()])

    def chosen(named: list[tuple[str, nn.Parameter]]) -> gradsel.Selection:
        return gradsel.Selection(
            {n: policy.choose(Scores(torch.randn(p.shape), tuple(p.shape), NeuronView())) for n, p in named}
        )

    named = llama()
    selection = chosen(named)
    ours = gradsel.MaskedAdam(named, masks=selection)
    nnz = selection.trainable_count()
    model = nn.ModuleList(nn.Linear(cols, rows, bias=False, dtype=torch.bfloat16) for rows, cols in LLAMA)
    gradsel.attach(model, chosen(list(model.named_parameters())))
    of_model = gradsel.MaskedAdam(gradsel.trainable_parameters(model))
    for values in gradsel.trainable_parameters(model):
        values.grad = torch.randn_like(values)
    line = 2 if isinstance(policy, gradsel.Rows) else LINE  # whole rows lie one entry after the other
    compare(
        "masked_adam_, bfloat16",
        f"Llama-3.2-1B, 2 layers, {policy}",
        "bfloat16",
        policy.k,
        {
            "torch Adam(fused), dense, bfloat16 state": (dense.step, 14 * weights),
            "dense float32 masters, torch Adam(fused)": (masters.step, (28 + 6 + 6) * weights),
            "native, attached": (of_model.step, (28 + 2 * line) * nnz),
            "native": (ours.step, (28 + 3 * line) * nnz),
        },
    )


# --- Where the time goes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [10, 50, 150, 1000])
def test_many_tensors(compare, count):
    """K = 1 of [768, 768] each, attached gradients: what a step costs before it computes anything."""
    made = {}
    for name, adam in (("fused", torch.optim.Adam), ("native", gradsel.MaskedAdam)):
        parameters = [nn.Parameter(torch.randn(768, 1)) for _ in range(count)]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        made[name] = adam(parameters, fused=True) if name == "fused" else adam(parameters)
    moved = 28 * 768 * count
    providers = {"torch Adam(fused), same tensors": (made["fused"].step, moved), "native": (made["native"].step, moved)}
    compare("MaskedAdam.step, many tensors", f"{count} tensors of 768", "float32", 1, providers)


@pytest.mark.parametrize("nnz", [10**5, 10**6, 10**7, 4 * 10**7])
def test_time_over_nnz(compare, nnz):
    """Compact gradients and values: 28 bytes an entry, all of them in order."""
    values = nn.Parameter(torch.randn(nnz))
    values.grad = torch.randn_like(values)
    compare("MaskedAdam.step, compact", f"{nnz:.0e} entries", "float32", 0, {
        "native": (gradsel.MaskedAdam([values]).step, 28 * nnz),
    })  # fmt: skip


@pytest.mark.parametrize("density", [0.001, 0.005, 0.02, 0.05, 0.1, 0.2])
def test_density(compare, density):
    """One matrix of 4096 x 4096, random masks: from which density on does dense Adam win?"""
    torch.manual_seed(0)
    size, k = 4096, round(4096 * density)
    weights = size * size

    def matrix() -> nn.Parameter:
        parameter = nn.Parameter(torch.randn(size, size))
        parameter.grad = torch.randn_like(parameter)
        return parameter

    dense = torch.optim.Adam([matrix()], fused=True)
    named = [("matrix", matrix())]
    ours = gradsel.MaskedAdam(named.copy(), masks=random_selection(named, k))
    model = nn.ModuleList([nn.Linear(size, size, bias=False)])
    gradsel.attach(model, random_selection(list(model.named_parameters()), k))
    (values,) = gradsel.trainable_parameters(model)
    values.grad = torch.randn_like(values)
    of_model = gradsel.MaskedAdam([values])
    lines = min(size * k, weights // 16)  # of 64 bytes; above one entry a line, all of them
    compare("masked_adam_, density", f"4096x4096, {100 * density:g} %", "float32", k, {
        "torch Adam(fused), dense": (dense.step, 28 * weights),
        "native, attached": (of_model.step, 28 * size * k + 2 * LINE * lines),
        "native": (ours.step, 20 * size * k + 3 * LINE * lines),
    })  # fmt: skip
