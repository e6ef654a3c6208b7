"""What the benchmarks share: the order of rounds, when they end, merged results, and one colour for each provider."""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmarks import draw
from benchmarks.harness import plots, results, tables
from benchmarks.harness.clock import Clock
from benchmarks.harness.environment import RESULTS
from benchmarks.harness.timing import Call, Rounds, compare
from gradsel.experiments.cost.timing import shuffled


def test_no_call_always_follows_the_same_one():
    orders = list(itertools.islice(shuffled("abcd"), 60))
    assert all(sorted(order) == list("abcd") for order in orders)
    followed = {pair for order in orders for pair in itertools.pairwise(order)}
    assert followed == set(itertools.permutations("abcd", 2))
    assert orders == list(itertools.islice(shuffled("abcd"), 60))


def test_rounds_end_by_number_or_time():
    rounds = Rounds(seconds=1, fewest=3, enough=5, most=40)
    assert rounds.over(40, 0)
    assert not rounds.over(39, 0.9)
    assert rounds.over(5, 1.1)
    assert not rounds.over(4, 1.1)
    assert rounds.over(3, 3.1)
    assert not rounds.over(2, 3.1)


def test_every_call_gets_one_sample_a_round():
    made = {"a": 0, "b": 0}

    def call(name):
        made[name] += 1

    calls = {name: Call([lambda name=name: call(name)], cold=True) for name in made}
    timings = compare(Clock(torch.device("cpu")), calls, Rounds(0, most=3))
    assert [timing.repeats for timing in timings.values()] == [3, 3]
    assert made == {"a": 6, "b": 6}  # three calls warm up; what is cold is not called again ahead of a sample


def test_an_error_is_raised_unless_someone_takes_it():
    def broken():
        raise RuntimeError("no")

    calls = {"good": Call([lambda: None]), "broken": Call([broken])}
    clock = Clock(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="no"):
        compare(clock, calls, Rounds(0, most=3))
    told = []
    assert set(compare(clock, calls, Rounds(0, most=3), lambda name, error: told.append(name))) == {"good"}
    assert told == ["broken"]


def row(**cells) -> dict[str, str]:
    return dict.fromkeys(results.CPU_FIELDS, "") | {name: str(cell) for name, cell in cells.items()}


def test_rows_with_the_same_key_are_replaced(tmp_path):
    path = tmp_path / "x.csv"
    old = [row(kernel="a", provider="native", p50_us=1), row(kernel="b", provider="native", p50_us=2)]
    results.merge(path, results.CPU_FIELDS, results.CPU_KEY, old)
    results.merge(path, results.CPU_FIELDS, results.CPU_KEY, [row(kernel="a", provider="native", p50_us=3)])
    assert [(found["kernel"], found["p50_us"]) for found in results.load(path)] == [("a", "3"), ("b", "2")]


def test_the_table_compares_every_k_with_the_one_baseline():
    times = {(0, "g.sum"): 1000, (1, "native"): 2000, (1, "topk"): 3000, (8, "native"): 4000}
    rows = [row(kernel="k", size="s", dtype="d", k=k, provider=name, p50_us=us) for (k, name), us in times.items()]
    lines = tables.over_baselines(rows).splitlines()[2:]
    assert [line.split(" | ")[3:] for line in lines] == [
        ["1", "2 ms", "", "g.sum 0.5x, topk 1.5x |"],
        ["8", "4 ms", "", "g.sum 0.25x |"],
    ]


def test_committed_results_have_one_figure_for_each_baseline():
    shapes = tables.by_shape(results.load(RESULTS / "cpu.csv"))
    for shape, by_k in shapes.items():
        assert not set(by_k.get(0, {})) & {name for k, own in by_k.items() if k for name in own}, shape


@pytest.mark.parametrize("name", ["cpu", "train_step-cpu"])
def test_pictures_are_drawn_from_committed_results(tmp_path, name):
    path = tmp_path / f"{name}.csv"
    path.write_text((RESULTS / f"{name}.csv").read_text())
    (picture,) = draw.draw(path)
    assert picture.stat().st_size > 10_000


def test_the_last_machine_is_drawn():
    rows = [row(device="a", threads=2, date="2026-01-01"), row(device="b", threads=2, date="2026-01-02")]
    assert results.latest(rows) == rows[1:]


def test_a_provider_without_a_colour_is_named():
    assert plots.colour("native, with bits") == plots.colour("native")
    assert plots.colour("gather_rows of weights") != plots.colour("gather")
    with pytest.raises(KeyError, match="COLOURS"):
        plots.colour("something else")
