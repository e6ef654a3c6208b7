"""One optimizer step: ours on a mask, against dense Adam in all of torch's implementations.

Every provider trains its own copy of the weights, so none finds another's data in a cache. A dense step takes the same
time for every K, so it is measured once, in the same rounds as all K. The largest test needs 8 GB of memory.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradsel
import gradsel_kernels as gk
from gradsel.masks import PerRow
from gradsel.ranking.scores import Scores
from gradsel.views import NeuronView

try:  # compared if installed
    import bitsandbytes
except ImportError:
    bitsandbytes = None

LINE = 64  # bytes that the memory moves for one scattered access on a CPU
#: Bytes of an entry: moments read and written, index, gradient read, weight read and written.
PER_ENTRY = 4 * 4 + 4 + LINE + 2 * LINE
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


def attached_step(k: int):
    """A step of an attached model, which has been seen to change a weight."""
    model, adam = attached(k)
    weight = next(model.parameters())
    before = weight.clone()
    adam.step()
    assert not torch.equal(weight, before)
    return lambda: (adam.step(), model)[0]  # the model has to live for as long as its optimizer


def published_step(k: int):
    """Dense masks multiplied onto dense gradients, then dense Adam: the time is the same for every K."""
    named = vit()
    adam = torch.optim.Adam([p for _, p in named], fused=True)
    masks = [mask.to_dense().float() for mask in random_selection(named, k).values()]

    def step() -> None:
        for (_, parameter), mask in zip(named, masks, strict=True):
            parameter.grad.mul_(mask)
        adam.step()

    return step


def test_step(contest):
    """Every K against the same dense steps, which do not depend on K."""
    torch.manual_seed(0)
    weights = sum(rows * cols for rows, cols in SHAPES)
    dense = torch.optim.Adam([p for _, p in vit()], fused=True)
    contenders = {
        0: {
            "torch Adam(fused), dense": (dense.step, 28 * weights),
            "dense mask, then torch Adam(fused)": (published_step(1), (28 + 12) * weights),
        }
    }
    read_only = vit()
    for k in (1, 2, 5, 10):
        ours, nnz = masked(k)
        selected = [mask.cols for mask in random_selection(read_only, k).values()]

        def gather_only(selected: list[torch.Tensor] = selected) -> None:
            """For scale: reads every selected weight and gradient once, by two calls a matrix, and nothing else."""
            for (_, parameter), cols in zip(read_only, selected, strict=True):
                gk.gather_rows(parameter.detach(), cols)
                gk.gather_rows(parameter.grad, cols)

        values = [nn.Parameter(torch.randn(rows, k)) for rows, _ in SHAPES]
        for value in values:
            value.grad = torch.randn_like(value)
        contenders[k] = {
            "gather_rows of weights and gradients": (gather_only, (4 + 4 + 2 * LINE) * nnz),
            "native, compact gradient and values": (gradsel.MaskedAdam(values).step, 28 * nnz),
            "native, attached": (attached_step(k), (28 + 2 * LINE) * nnz),
            "native": (ours.step, PER_ENTRY * nnz),
        }
    contest("masked_adam_", "ViT-B/16, 86 M", "float32", contenders)


def test_other_dense_steps(contest):
    """torch's other implementations and those of bitsandbytes: apart from the rest, because they are slow."""
    torch.manual_seed(0)
    weights = sum(rows * cols for rows, cols in SHAPES)
    made = {
        "torch Adam(foreach), dense": torch.optim.Adam([p for _, p in vit()], foreach=True),
        "torch Adam(single), dense": torch.optim.Adam([p for _, p in vit()], foreach=False),
    }
    if bitsandbytes is not None:
        made["bitsandbytes Adam, dense"] = bitsandbytes.optim.Adam([p for _, p in vit()])
        made["bitsandbytes Adam8bit, dense"] = bitsandbytes.optim.Adam8bit([p for _, p in vit()])
    providers = {name: (adam.step, (16 if "8bit" in name else 28) * weights) for name, adam in made.items()}
    contest("masked_adam_", "ViT-B/16, 86 M", "float32", {0: providers})


def test_cost_does_not_depend_on_the_size_of_the_model(contest):
    """Twice the columns, and the same number of selected entries."""
    torch.manual_seed(0)
    flush = torch.zeros(2**25)
    contenders = {0: {"memory written in between": (lambda: flush.add_(1), 2 * flush.nbytes)}}
    for k in (1, 10):
        twice, nnz = masked(k, width=2)
        once, same = masked(k)
        assert nnz == same
        contenders[k] = {
            "native, 172 M weights": (twice.step, PER_ENTRY * nnz),
            "native": (once.step, PER_ENTRY * nnz),
        }
    contest("masked_adam_, twice the model", "ViT-B/16, 86 M", "float32", contenders)


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
    """Mixed precision as usual: dense Adam on float32 copies of all weights, which are then rounded back."""

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


def low_precision(policy) -> dict:
    """Ours on a policy's random selection: with dense gradients and attached."""

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
    whole_rows = isinstance(policy, gradsel.Rows)
    line = 2 if whole_rows else LINE  # entries of whole rows lie side by side
    name = "native, rows" if whole_rows else "native"
    return {
        f"{name}, attached": (lambda: (of_model.step(), model)[0], (28 + 2 * line) * nnz),
        name: (ours.step, (28 + 3 * line) * nnz),
    }


def test_low_precision(contest):
    torch.manual_seed(0)
    weights = sum(rows * cols for rows, cols in LLAMA)
    dense = torch.optim.Adam([p for _, p in llama()], fused=True)
    masters = DenseMasters([p for _, p in llama()])
    contenders = {
        0: {
            "torch Adam(fused), dense, bfloat16 state": (dense.step, 14 * weights),
            "dense float32 masters, torch Adam(fused)": (masters.step, (28 + 6 + 6) * weights),
        },
        3: low_precision(gradsel.Rows(3)),
        **{k: low_precision(gradsel.PerNeuron(k)) for k in (1, 2, 5, 10)},
    }
    contest("masked_adam_, bfloat16", "Llama-3.2-1B, 2 layers", "bfloat16", contenders)


# --- Where the time goes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [10, 50, 150, 1000])
def test_many_tensors(contest, count):
    """K = 1 of [768, 768] each, attached gradients: what a step costs before it computes anything."""
    made = {}
    for name, adam in (("fused", torch.optim.Adam), ("native", gradsel.MaskedAdam)):
        parameters = [nn.Parameter(torch.randn(768, 1)) for _ in range(count)]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        made[name] = adam(parameters, fused=True) if name == "fused" else adam(parameters)
    moved = 28 * 768 * count
    providers = {"torch Adam(fused), same tensors": (made["fused"].step, moved), "native": (made["native"].step, moved)}
    contest("MaskedAdam.step, many tensors", f"{count} tensors of 768", "float32", {1: providers})


@pytest.mark.parametrize("nnz", [10**5, 10**6, 10**7, 4 * 10**7])
def test_time_over_nnz(contest, nnz):
    """Compact gradients and values: 28 bytes an entry, all of them side by side."""
    values = nn.Parameter(torch.randn(nnz))
    values.grad = torch.randn_like(values)
    providers = {"native": (gradsel.MaskedAdam([values]).step, 28 * nnz)}
    contest("MaskedAdam.step, compact", f"{nnz:.0e} entries", "float32", {0: providers})


def test_density(contest):
    """One matrix with random masks: at which density does dense Adam win?"""
    torch.manual_seed(0)
    size = 4096
    weights = size * size

    def matrix() -> nn.Parameter:
        parameter = nn.Parameter(torch.randn(size, size))
        parameter.grad = torch.randn_like(parameter)
        return parameter

    contenders = {0: {"torch Adam(fused), dense": (torch.optim.Adam([matrix()], fused=True).step, 28 * weights)}}
    for density in (0.001, 0.005, 0.02, 0.05, 0.1, 0.2):
        k = round(size * density)
        named = [("matrix", matrix())]
        ours = gradsel.MaskedAdam(named.copy(), masks=random_selection(named, k))
        model = nn.ModuleList([nn.Linear(size, size, bias=False)])
        gradsel.attach(model, random_selection(list(model.named_parameters()), k))
        (values,) = gradsel.trainable_parameters(model)
        values.grad = torch.randn_like(values)
        of_model = gradsel.MaskedAdam([values])
        lines = min(size * k, weights // 16)  # of 64 bytes: one for each entry, until all of them are read
        contenders[k] = {
            "native, attached": (
                lambda of_model=of_model, model=model: (of_model.step(), model)[0],
                28 * size * k + 2 * LINE * lines,
            ),
            "native": (ours.step, 20 * size * k + 3 * LINE * lines),
        }
    contest("masked_adam_, density", f"{size}x{size}", "float32", contenders)
