"""select() against a naive implementation: rules, layouts, criteria, and a model given back as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradsel
from gradsel.masks import Frozen, PerRow, Whole
from gradsel.parameters.rules import parameter_rules
from gradsel.ranking.criteria import relative_to_input
from tests.support.toy import Toy, batches, cross_entropy


def supcon(model, batch):
    return gradsel.SupConLoss()(model.features(batch[0]), batch[1])


def naive(model, loss, k):
    """Dense gradients summed over the batches, then a stable argsort of every row, as in published code."""
    model.zero_grad()
    for batch in batches():
        loss(model, batch).backward()
    masks = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and parameter.ndim >= 2:
            rows = parameter.grad.abs().flatten(1)
            order = rows.argsort(dim=1, descending=True, stable=True)[:, :k]
            masks[name] = torch.zeros_like(rows, dtype=torch.bool).scatter_(1, order, True).view(parameter.shape)
    model.zero_grad()
    return masks


@pytest.mark.supports("CPU", "select")
@pytest.mark.parametrize("loss", [cross_entropy, supcon])
@pytest.mark.parametrize("k", [1, 3, 1000])
def test_equals_a_naive_selection(k, loss):
    model = Toy().eval()
    expected = naive(model, loss, k)
    selection = gradsel.select(model, batches(), loss, gradsel.PerNeuron(k))
    ranked = {name for name, mask in selection.items() if isinstance(mask, PerRow)}
    assert ranked == {"patch_embed.weight"} | {f"blocks.{i}.{m}.weight" for i in (0, 1) for m in ("qkv", "fc1", "fc2")}
    for name in ranked:
        assert torch.equal(selection[name].to_dense(), expected[name])


@pytest.mark.parametrize("k", [1, 3, 1000])
def test_rows_and_columns_have_the_largest_sums_of_squares(k):
    torch.manual_seed(0)
    model = Toy().eval()
    grads = {}
    model.zero_grad()
    for batch in batches():
        cross_entropy(model, batch).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for policy, dim, kind in ((gradsel.Rows(k), 1, "rows"), (gradsel.Columns(k), 0, "columns")):
        selection = gradsel.select(model, batches(), cross_entropy, policy)
        ranked = [name for name, mask in selection.items() if mask.kind == kind]
        assert "blocks.0.fc1.weight" in ranked
        assert "patch_embed.weight" in ranked
        for name in ranked:
            sums = grads[name].flatten(1).square().sum(dim)
            expected = sums.topk(min(k, len(sums))).indices.sort().values
            (found,) = selection[name].tensors().values()
            assert torch.equal(found.long(), expected), name


def test_the_default_rules():
    selection = gradsel.select(Toy(), batches(), cross_entropy)
    whole = {name for name, mask in selection.items() if isinstance(mask, Whole)}
    assert whole == {"patch_embed.bias", "unused.bias", "head.weight", "head.bias"} | {
        f"blocks.{i}.{m}" for i in (0, 1) for m in ("qkv.bias", "fc1.bias", "fc2.bias", "gamma")
    }
    frozen = {name: mask.reason for name, mask in selection.items() if isinstance(mask, Frozen)}
    assert frozen == {
        "cls_token": "token",
        "pos_embed": "position embedding",
        "bn.weight": "normalisation",
        "bn.bias": "normalisation",
        "blocks.0.norm.weight": "normalisation",
        "blocks.0.norm.bias": "normalisation",
        "blocks.1.norm.weight": "normalisation",
        "blocks.1.norm.bias": "normalisation",
        "tokens.weight": "embedding",
        "unused.weight": "no gradient",
    }
    assert set(selection) == {name for name, _ in Toy().named_parameters()}


def test_patterns_override_the_rules():
    selection = gradsel.select(
        Toy(), batches(), cross_entropy, whole=["*.norm.*"], freeze=["blocks.0.*"], rank=["head.weight"]
    )
    assert selection["blocks.1.norm.weight"].kind == "whole"
    assert selection["blocks.0.norm.weight"].kind == "whole"  # whole goes before freeze
    assert selection["blocks.0.fc1.weight"].kind == "frozen"
    assert selection["head.weight"].kind == "per-row"
    probe = gradsel.select(Toy(), None, None, criterion="random", freeze=["*"], whole=["head.*"])
    assert {name for name, mask in probe.items() if mask.nnz} == {"head.weight", "head.bias"}
    assert gradsel.select(Toy(), batches(), cross_entropy, head=[])["head.weight"].kind == "per-row"


def test_tied_weights_are_judged_by_all_their_uses():
    model = nn.Module()
    model.embed = nn.Embedding(9, 4)
    model.lm_head = nn.Linear(4, 9, bias=False)
    model.lm_head.weight = model.embed.weight
    rules = parameter_rules(model)
    assert set(rules) == {"embed.weight"}
    assert (rules["embed.weight"].action, rules["embed.weight"].reason) == ("freeze", "embedding, tied")
    assert parameter_rules(model, rank=["lm_head.weight"])["embed.weight"].action == "rank"


def test_axes_of_transposed_and_stacked_layouts():
    class Conv1D(nn.Module):  # as in transformers: [in, out]
        def __init__(self):
            super().__init__()
            self.nf, self.weight = 5, nn.Parameter(torch.randn(3, 5))

    model = nn.Module()
    model.conv1d = Conv1D()
    model.up = nn.ConvTranspose2d(8, 6, 2, groups=2)
    model.conv = nn.Conv1d(4, 7, 3)
    model.experts = nn.Module()
    model.experts.gate = nn.Parameter(torch.randn(2, 5, 3))
    selection = gradsel.select(model, None, None, criterion="random")
    rows = {name: mask.compact_shape[0] for name, mask in selection.items() if mask.kind == "per-row"}
    assert rows == {"conv1d.weight": 5, "up.weight": 6, "conv.weight": 7, "experts.gate": 10}


def test_everything_is_given_back_as_it_was():
    model = Toy()
    model.train()
    model.blocks[0].eval()
    model.head.weight.requires_grad_(False)
    model.patch_embed.weight.grad = torch.ones_like(model.patch_embed.weight)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    rng = torch.get_rng_state()

    def loss(model, batch):
        model.blocks[1].eval()
        return cross_entropy(model, batch)

    gradsel.select(model, batches(), loss)
    assert torch.equal(torch.get_rng_state(), rng)
    assert [module.training for module in model.modules()] == modes
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == flags[name][0]
        assert parameter.grad is flags[name][1]
    assert torch.equal(model.patch_embed.weight.grad, torch.ones_like(model.patch_embed.weight))


def test_given_back_even_after_an_error():
    model = Toy()

    def failing(model, batch, seen=[]):  # noqa: B006
        seen.append(batch)
        if len(seen) == 2:
            raise RuntimeError("out of memory")
        return cross_entropy(model, batch)

    with pytest.raises(RuntimeError, match="out of memory"):
        gradsel.select(model, batches(), failing)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_the_same_selection_on_every_run_and_gradients_kept_signed():
    model = Toy().eval()
    first, second = (gradsel.select(model, batches(), cross_entropy) for _ in range(2))
    assert all(torch.equal(first[name].to_dense(), second[name].to_dense()) for name in first)

    def alternating(model, batch, sign=[1.0]):  # noqa: B006
        sign[0] = -sign[0]
        return sign[0] * cross_entropy(model, batch)

    twice = [batches()[0], batches()[0]]
    with pytest.warns(UserWarning, match=r"zero .*raise loss_scale"):
        cancelled = gradsel.select(model, twice, alternating)
    assert cancelled["blocks.0.fc1.weight"].cols.eq(0).all()  # a zero row selects its first input
    assert cancelled.notes["neurons that score zero"] > 0


def test_low_precision_gradients_are_summed_in_float32():
    model = Toy().bfloat16().eval()
    data = [(x.bfloat16(), y) for x, y in batches()]
    sums = {}
    for batch in data:
        model.zero_grad()
        cross_entropy(model, batch).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                sums[name] = sums.get(name, 0) + parameter.grad.float()
    selection = gradsel.select(model, data, cross_entropy, gradsel.PerNeuron(2))
    for name, mask in selection.items():
        if isinstance(mask, PerRow):
            rows = sums[name].abs().flatten(1)
            kept = rows.gather(1, mask.cols.long()).sort(1, descending=True).values
            assert torch.equal(kept, rows.topk(2, 1).values)


def test_buffers_come_back_even_replaced_or_expanded():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)
            self.register_buffer("seen", torch.zeros(()))
            self.register_buffer("mask", torch.ones(1, 3).expand(2, 3))

        def forward(self, x):
            self.seen = self.seen + 1
            return self.layer(x)

    model = Counting()
    seen = model.seen
    gradsel.select(model, [torch.randn(4, 3)], lambda m, x: m(x).square().sum())
    assert model.seen is seen
    assert float(seen) == 0


def test_names_of_wrapped_models_are_those_of_the_model():
    model = Toy()
    wrapped = nn.Module()
    wrapped.module = model
    wrapped.forward = model.forward
    selection = gradsel.select(wrapped, None, None, criterion="magnitude", freeze=["blocks.0.*"])
    assert set(selection) == {name for name, _ in model.named_parameters()}
    gradsel.freeze(wrapped, selection)
    gradsel.MaskedAdam(model.named_parameters(), masks=selection)


def test_parameters_that_are_no_floats_are_frozen():
    model = nn.Linear(3, 2)
    model.table = nn.Parameter(torch.zeros(4, 5, dtype=torch.int8), requires_grad=False)
    selection = gradsel.select(model, [torch.randn(4, 3)], lambda m, x: m(x).square().sum())
    assert selection["table"].reason == "int8"
    with pytest.raises(ValueError, match=r"rank .*table.*int8"):
        gradsel.select(model, None, None, criterion="magnitude", rank=["table"])


#: For each criterion, what it sums over batches, and its scores given that sum and the weight.
FIRST_PRINCIPLES = {
    "gradient": (lambda grad: grad, lambda total, weight: total.abs()),
    "absolute": (lambda grad: grad.abs(), lambda total, weight: total),
    "fisher": (lambda grad: grad.square(), lambda total, weight: total),
    "relative": (lambda grad: grad, lambda total, weight: total.abs() / total.square().mean(0).sqrt().clamp(min=1e-30)),
    "snip": (lambda grad: grad, lambda total, weight: (weight * total).abs()),
}


def test_relative_scores_know_no_scale_of_inputs():
    """Inputs that are 0, tiny or huge, whose squares have no float32, compete like all others."""
    grad = torch.tensor([[3.0, 1.0, 0.0, -1.0], [-4.0, 1.0, 0.0, 2.0]])
    scores = relative_to_input(grad)
    assert torch.allclose(scores.square().mean(0), torch.tensor([1.0, 1.0, 0.0, 1.0]))
    assert torch.equal(scores.sign(), grad.sign())
    assert torch.allclose(relative_to_input(grad * torch.tensor([1e30, 1e-30, 1.0, 7.0])), scores)
    assert relative_to_input(grad.half() * 1e4).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("criterion", FIRST_PRINCIPLES)
def test_criteria_equal_their_definitions(criterion, dtype):
    torch.manual_seed(0)
    model = Toy().eval().to(dtype)
    data = [(images.to(dtype), labels) for images, labels in batches()]
    each_batch, score = FIRST_PRINCIPLES[criterion]
    name = "blocks.1.fc2.weight"
    weight = model.get_parameter(name)
    total = torch.zeros(weight.shape)
    for batch in data:
        model.zero_grad()
        cross_entropy(model, batch).backward()
        total += each_batch(weight.grad.float())
    model.zero_grad()
    scores = score(total, weight.detach().float())
    squares = scores if criterion == "fisher" else scores.square()
    for policy, expected in [
        (gradsel.PerNeuron(3), scores.topk(3, 1).indices),
        (gradsel.Rows(3), squares.sum(1).topk(3).indices),
        (gradsel.Columns(3), squares.sum(0).topk(3).indices),
    ]:
        if criterion == "relative" and isinstance(policy, gradsel.Columns):
            with pytest.raises(ValueError, match=r"gives all inputs of a weight the same score, so Columns\(k=3\) has"):
                gradsel.select(model, data, cross_entropy, policy, criterion)
            continue
        selection = gradsel.select(model, data, cross_entropy, policy, criterion)
        (found,) = selection[name].tensors().values()
        assert torch.equal(found.long(), expected.sort(-1).values)
        assert selection.notes["criterion"] == criterion
    assert weight.grad is None


def test_other_criteria():
    model = Toy()
    magnitude = gradsel.select(model, None, None, gradsel.PerNeuron(2), "magnitude")
    weight = model.blocks[0].fc1.weight.detach().abs()
    assert torch.equal(magnitude["blocks.0.fc1.weight"].cols.long(), weight.topk(2, 1).indices.sort(1).values)
    one, same = (gradsel.select(model, None, None, criterion="random") for _ in range(2))
    other = gradsel.select(model, None, None, criterion=gradsel.random_scores(seed=1))
    assert torch.equal(one["blocks.0.fc1.weight"].cols, same["blocks.0.fc1.weight"].cols)
    criterion = gradsel.random_scores(seed=1)
    again = [gradsel.select(model, None, None, criterion=criterion)["blocks.0.fc1.weight"].cols for _ in range(2)]
    assert torch.equal(*again)
    assert not torch.equal(one["blocks.0.fc1.weight"].cols, other["blocks.0.fc1.weight"].cols)

    def saliency(weight, grad):
        return weight * grad

    model.eval()
    snip = gradsel.select(model, batches(), cross_entropy, criterion=saliency)
    assert snip.notes["criterion"] == "saliency"
    for batch in batches():
        cross_entropy(model, batch).backward()
    parameter = model.blocks[1].qkv.weight
    expected = (parameter * parameter.grad).abs().argmax(1, keepdim=True)
    assert torch.equal(snip["blocks.1.qkv.weight"].cols.long(), expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batches": []}, ValueError, "batches .*empty"),
        ({"batches": None}, ValueError, "criterion 'gradient'"),
        ({"loss": lambda m, b: torch.tensor(1.0)}, ValueError, r"scalar .*\[\] without"),
        ({"loss": lambda m, b: m(b[0])}, ValueError, r"scalar .*\[10, 4\]"),
        ({"loss": lambda m, b: 3.0}, ValueError, "scalar .*float"),
        ({"loss": lambda m, b: cross_entropy(m, b) * float("nan")}, ValueError, "batch 1 .*nan"),
        ({"criterion": "hessian"}, ValueError, "criterion 'hessian'.*gradient, absolute, fisher"),
        ({"rank": ["unused.weight"]}, ValueError, r"unused\.weight .*no gradient"),
        ({"freeze": ["blocks.0.qvk.weight"]}, ValueError, r"blocks\.0\.qkv\.weight"),
    ],
)
def test_bad_input(arguments, error, message):
    model = Toy()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=message):
        gradsel.select(model, **{"batches": batches(), "loss": cross_entropy, **arguments})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_gradient_that_is_not_finite_names_the_parameter():
    model = Toy().eval()

    def loss(model, batch):
        out = cross_entropy(model, batch)
        weight = model.blocks[1].fc2.weight
        return out + (weight[0, 0] - weight[0, 0].detach()).abs().sqrt()  # derivative 1 / 0

    with pytest.raises(ValueError, match=r"blocks\.1\.fc2\.weight .*not finite \(1 of 288"):
        gradsel.select(model, batches(), loss)


@pytest.mark.parametrize("policy", [gradsel.Rows, gradsel.Columns])
def test_rows_and_columns_need_a_positive_k(policy):
    with pytest.raises(ValueError, match=rf"{policy.__name__}\(k\) .*k >= 1.*0"):
        policy(0)


def test_per_neuron_needs_a_positive_k():
    with pytest.raises(ValueError, match=r"k >= 1.*0"):
        gradsel.PerNeuron(0)
