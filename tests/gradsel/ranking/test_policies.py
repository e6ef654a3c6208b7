"""Policies against plain definitions: every entry sorted, the best taken."""

from __future__ import annotations

import itertools

import pytest
import torch

import gradsel
import gradsel_kernels as gk
from gradsel.masks import Whole
from gradsel.parameters.rules import ranked_sizes
from gradsel.ranking.largest import covering_columns, largest
from gradsel.ranking.scores import Scores
from gradsel.views import NeuronView
from tests.support.toy import Toy, batches, cross_entropy


def best_entries(scores: dict[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    """Boolean masks of the ``count`` largest magnitudes over all matrices; ties go to the first matrix and entry."""
    order = sorted(
        ((-abs(value), number, entry) for number, score in enumerate(scores.values())
         for entry, value in enumerate(score.flatten().tolist()))
    )[:count]  # fmt: skip
    masks = [torch.zeros(score.numel(), dtype=torch.bool) for score in scores.values()]
    for _, number, entry in order:
        masks[number][entry] = True
    return {name: mask.view(score.shape) for (name, score), mask in zip(scores.items(), masks, strict=True)}


def gradients(model):
    model.zero_grad()
    for batch in batches():
        cross_entropy(model, batch).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("count", [1, 5, 37, 100])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)], ids=str)
def test_global_takes_the_best_whatever_the_order_of_arrival(order, count, ties):
    shapes = {"a": (3, 7), "b": (1, 1), "c": (11, 6)}
    scores = {name: torch.randn(shape) for name, shape in shapes.items()}
    if ties:
        scores = {name: (2 * score).round() for name, score in scores.items()}
    expected = best_entries(scores, count)
    ranking = gradsel.Global(count=count).start(shapes)
    for name in [list(shapes)[i] for i in order]:
        ranking.add(name, Scores(scores[name], shapes[name], NeuronView()))
    masks = ranking.finish()
    assert sum(mask.nnz for mask in masks.values()) == min(count, 88)
    for name in shapes:
        assert torch.equal(masks[name].to_dense(), expected[name]), name


@pytest.mark.parametrize("policy", [gradsel.PerLayer(count=9), gradsel.PerLayer(fraction=0.05)], ids=str)
def test_per_layer_takes_the_best_of_each_parameter(policy):
    model = Toy().eval()
    grads = gradients(model)
    selection = gradsel.select(model, batches(), cross_entropy, policy)
    checked = 0
    for name, mask in selection.items():
        if mask.kind == "irregular":
            count = 9 if policy.count else round(0.05 * grads[name].numel())
            expected = best_entries({"": grads[name].flatten(1)}, count)[""]
            assert torch.equal(mask.to_dense().flatten(1), expected), name
            checked += 1
    assert checked == 7


def test_global_selects_over_the_whole_model():
    model = Toy().eval()
    grads = gradients(model)
    sizes = ranked_sizes(model)
    selection = gradsel.select(model, batches(), cross_entropy, gradsel.Global(fraction=0.02))
    count = round(0.02 * sum(rows * cols for rows, cols in sizes.values()))
    expected = best_entries({name: grads[name].flatten(1) for name in sizes if name in grads}, count)
    for name, mask in expected.items():
        assert torch.equal(selection[name].to_dense().flatten(1), mask), name
    assert selection["unused.weight"].label == "no gradient"


def test_transposed_layouts_rank_ties_in_the_neuron_view():
    score = torch.zeros(3, 4)  # neurons, inputs
    score[1, 2] = score[2, 0] = score[0, 3] = -5.0
    mask = gradsel.PerLayer(count=2).choose(Scores(score, (4, 3), NeuronView((1,))))
    assert mask.to_dense().nonzero().tolist() == [[2, 1], [3, 0]]


def kept_score(score, columns, k):
    return float(score.abs()[:, list(columns)].topk(min(k, len(columns)), dim=1).values.sum())


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_column_budget_is_greedy_and_near_the_best(count, k):
    for seed in range(20):
        score = torch.randn(9, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        found = covering_columns(score, k, count).tolist()
        greedy: list[int] = []
        while len(greedy) < count:  # the definition, without any shortcut
            rest = [column for column in range(7) if column not in greedy]
            greedy.append(max(rest, key=lambda column: (kept_score(score, [*greedy, column], k), -column)))
        assert found == sorted(greedy)
        best = max(kept_score(score, columns, k) for columns in itertools.combinations(range(7), count))
        assert kept_score(score, found, k) >= (1 - 1 / torch.e) * best


def test_column_budget_on_matrices_with_many_columns_and_ties():
    score = torch.zeros(50, 300)
    score[:, 200] = 1.0
    score[:25, 7] = score[25:, 90] = 2.0
    assert covering_columns(score, 1, 2).tolist() == [7, 90]
    assert covering_columns(score, 1, 5).tolist() == [0, 1, 2, 7, 90]  # among columns that add nothing, the lowest
    assert covering_columns(score, 3, 3).tolist() == [7, 90, 200]
    assert covering_columns(torch.zeros(4, 3), 2, 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("columns", [2, 3, 5, 1000])
def test_per_neuron_inside_a_column_budget(columns):
    model = Toy().eval()
    grads = gradients(model)
    selection = gradsel.select(model, batches(), cross_entropy, gradsel.PerNeuron(2, columns=columns))
    ranked = [name for name, mask in selection.items() if mask.kind == "per-row"]
    assert len(ranked) == 7
    for name in ranked:
        mask = selection[name]
        score = grads[name].flatten(1).abs()
        used = mask.used_columns()
        assert used.numel() <= columns
        assert mask.compact_shape == (score.shape[0], 2)
        allowed = covering_columns(score, 2, columns)
        expected = allowed[score[:, allowed].topk(2, dim=1).indices].sort(1).values
        assert torch.equal(mask.cols.long(), expected)
    assert str(gradsel.PerNeuron(2, columns=5)) == "PerNeuron(k=2, columns=5)"


@pytest.mark.parametrize("numel", [1, 5, 100, 1000])
def test_largest_breaks_ties_to_the_lowest_place(numel):
    for count in {1, 2, numel // 40, numel // 3, numel - 1, numel} - {0}:
        values = (torch.randn(numel) * 4).round()
        expected = sorted(sorted(range(numel), key=lambda i: (-abs(values[i].item()), i))[:count])
        assert largest(values, count).tolist() == expected
    assert largest(torch.randn(3), 0).tolist() == []


KINDS = [gradsel.PerNeuron, gradsel.ByMass, gradsel.Rows, gradsel.Columns, gradsel.PerLayer, gradsel.Global]


@pytest.mark.parametrize("policy", KINDS, ids=lambda kind: kind.__name__)
def test_budgets_are_what_a_selection_trains(policy):
    model = Toy().eval()
    made = policy(3) if policy in KINDS[:4] else policy(fraction=0.03)
    selection = gradsel.select(model, None, None, made, "magnitude")
    sizes = ranked_sizes(model)
    assert made.budget(sizes.values()) == sum(selection[name].nnz for name in sizes)
    assert not any(isinstance(selection[name], Whole) for name in sizes)


@pytest.mark.parametrize("policy", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("like", [gradsel.PerNeuron(1), gradsel.Rows(4), gradsel.PerLayer(fraction=0.1)], ids=str)
def test_equal_budgets(like, policy):
    sizes = list(ranked_sizes(Toy()).values())
    wanted = like.budget(sizes)
    made = gradsel.equal_budget(policy, like, sizes)
    assert isinstance(made, policy)
    gap = abs(made.budget(sizes) - wanted)
    if policy is gradsel.Global:
        assert gap == 0
    elif policy is gradsel.PerLayer:
        assert gap <= len(sizes)  # each rounds
    else:  # no other k comes closer
        assert gap == min(abs(policy(k).budget(sizes) - wanted) for k in range(1, 100))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gradsel.PerLayer(), "PerLayer .*fraction or count"),
        (lambda: gradsel.Global(fraction=0.1, count=3), "Global .*fraction or count"),
        (lambda: gradsel.Global(fraction=0.0), r"0 < fraction <= 1.*0\.0"),
        (lambda: gradsel.PerLayer(fraction=1.5), r"0 < fraction <= 1.*1\.5"),
        (lambda: gradsel.PerLayer(count=0), r"PerLayer\(count\) .*count >= 1.*0"),
        (lambda: gradsel.PerNeuron(2.5), r"PerNeuron\(k\) .*k >= 1.*2\.5"),
        (lambda: gradsel.PerNeuron(3, columns=2), r"PerNeuron\(k=3, columns=2\)"),
        (lambda: gradsel.Rows(True), "k >= 1.*True"),
    ],
)
def test_impossible_policies(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "policy",
    [
        gradsel.PerNeuron(3),
        gradsel.PerNeuron(1, columns=9),
        gradsel.ByMass(3),
        gradsel.PerLayer(fraction=0.01),
        gradsel.Global(count=500),
        gradsel.Rows(5),
        gradsel.Columns(5),
    ],
    ids=str,
)
def test_the_same_masks_on_any_backend_and_with_any_number_of_threads(policy):
    """Large enough for torch to split its sums over threads, and rounded so that ties are everywhere."""
    score = (torch.randn(700, 500) * 3).round()
    view = NeuronView()
    expected = policy.choose(Scores(score, (700, 500), view)).to_dense()
    with gk.use_backend("reference"):
        assert torch.equal(policy.choose(Scores(score, (700, 500), view)).to_dense(), expected)
    threads = torch.get_num_threads()
    try:
        for count in (2, 3):
            torch.set_num_threads(count)
            assert torch.equal(policy.choose(Scores(score, (700, 500), view)).to_dense(), expected)
    finally:
        torch.set_num_threads(threads)


def test_everything_selected_is_a_whole_mask():
    for policy in (gradsel.PerLayer(fraction=1.0), gradsel.Global(count=10**6)):
        assert gradsel.select(Toy(), None, None, policy, "magnitude")["blocks.0.fc1.weight"].is_whole


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2)], ids=str)
def test_by_mass_gives_layers_entries_in_proportion_to_their_gradients(order, k):
    shapes = {"a": (6, 70), "b": (3, 50), "c": (12, 4), "zero": (3, 50)}
    sizes = dict(zip(shapes, (1.0, 4.0, 2.0, 0.0), strict=True))
    scores = {name: sizes[name] * torch.randn(shape) for name, shape in shapes.items()}
    policy = gradsel.ByMass(k)
    ranking = policy.start(shapes)
    for name in [list(shapes)[i] for i in order]:
        ranking.add(name, Scores(scores[name], shapes[name], NeuronView()))
    masks = ranking.finish()

    most = {name: min(8 * k, cols) for name, (_, cols) in shapes.items()}
    masses = {name: float(score.abs().sum(dtype=torch.float64)) for name, score in scores.items()}
    shares = dict.fromkeys(shapes, 1)
    left = policy.budget(shapes.values()) - sum(rows for rows, _ in shapes.values())
    while fits := [name for name, (rows, _) in shapes.items() if rows <= left and shares[name] < most[name]]:
        next_one = max(fits, key=lambda name: masses[name] / shapes[name][0] / shares[name])
        shares[next_one] += 1
        left -= shapes[next_one][0]
    for name, share in shares.items():
        expected = gradsel.PerNeuron(share).choose(Scores(scores[name], shapes[name], NeuronView()))
        assert torch.equal(masks[name].to_dense(), expected.to_dense()), name
    assert 0 <= left < 3
    if k > 1:
        assert shares["b"] > shares["a"] > shares["zero"]


def test_by_mass_alone_is_per_neuron_and_ties_go_to_the_first_parameter_and_the_lowest_column():
    score = torch.ones(4, 30)
    one = Scores(score, (4, 30), NeuronView())
    assert gradsel.ByMass(3).choose(one).to_dense()[:, :3].all()
    ranking = gradsel.ByMass(3).start({"a": (4, 30), "b": (4, 30), "c": (4, 3)})
    for name, cols in (("c", 3), ("b", 30), ("a", 30)):
        ranking.add(name, Scores(torch.ones(4, cols), (4, cols), NeuronView()))
    masks = ranking.finish()
    assert {name: mask.nnz // 4 for name, mask in masks.items()} == {"a": 4, "b": 4, "c": 1}
    assert masks["a"].to_dense()[:, :4].all()
