"""The tables of the papers' experiments: ours beside the printed numbers, where these are about the same."""

from __future__ import annotations

from gradsel.experiments.papers import experiment
from gradsel.experiments.papers.results import Row, table_of
from gradsel.papers.printed import printed


def row(name, method, data, value, metric="top1", model="ViT-B/16", setting="", seed=0, percent=None):
    return Row(
        name, model, method, data, setting, seed, metric, value, 1e-3, 1, percent, None, None, None, "{}", ""
    )  # fmt: skip


def lines(name, rows):
    cells = [line.split("|")[1:-1] for line in table_of(experiment(name), rows).splitlines() if line.startswith("|")]
    return [tuple(cell.strip() for cell in line) for line in cells[2:]]


def test_the_paper_stands_beside_ours():
    value = printed()["gps/table2"].value("GPS", "CUB-200-2011")
    (found,) = lines("gps/table2", [row("gps/table2", "GPS", "CUB-200-2011", value - 1)])
    assert found[1:3] == ("GPS", "CUB-200-2011")
    assert found[-2:] == (f"{value:.2f}", "-1.00")


def test_means_are_compared_only_where_all_data_sets_are_there():
    names = experiment("gps/table2").data
    some = [row("gps/table2", "SSF", name, 90.0, percent=0.4) for name in names[:2]]
    assert [line[2] for line in lines("gps/table2", some)][2:] == ["mean of 2", ""]
    assert all(line[-2:] == ("", "") for line in lines("gps/table2", some)[2:])
    every = [row("gps/table2", "SSF", name, 90.0, percent=0.4) for name in names]
    *_, mean, share = lines("gps/table2", every)
    assert mean[2:] == ("Mean", "", "top1", "90.00", "90.72", "-0.72")
    assert share[4:] == ("trained in %", "0.40", "0.45", "-0.05")


def test_seeds_have_a_deviation():
    rows = [row("gps/table6", "Net", "Stanford Cars", value, seed=n) for n, value in enumerate((88.0, 90.0))]
    (found,) = lines("gps/table6", rows)
    assert found[5] == "89.00 ± 1.41"


def test_models_have_columns_or_rows_of_their_own():
    (found,) = lines("gps/table10", [row("gps/table10", "SSF", "CIFAR-100", 93.0, model="Swin-B")])
    assert found[-2] == "93.06"
    (found,) = lines("gps/table9", [row("gps/table9", "SSF", "Stanford Cars", 93.0, model="ConvNeXt-B")])
    assert found[-2] == "92.50"
    names = experiment("gps/table4").data
    *_, mean = lines("gps/table4", [row("gps/table4", "GPS", name, 92.0, model="Swin-B") for name in names])
    assert mean[-2] == "92.56"


def test_columns_may_be_metrics_and_differences():
    (found,) = lines("gps/table8", [row("gps/table8", "SSF", "ImageNet-1K", 40.0, "ImageNet-A")])
    assert found[-2] == "45.88"
    rows = [row("gps/table5", name, "Kvasir-SEG", value, "mDice") for name, value in (("Full", 70.0), ("GPS", 88.0))]
    assert lines("gps/table5", rows)[-1][1:] == ("GPS - Full", "", "", "mDice", "18.00", "17.00", "+1.00")


def test_figures_without_stated_numbers_have_none_beside_them():
    (found,) = lines("gps/fig4", [row("gps/fig4", "GPS", "CUB-200-2011", 89.0, setting="K=1")])
    assert found[-2:] == ("", "")
    names = experiment("gps/overlap").data
    rows = [row("gps/overlap", "GPS", name, 60.0, "shared") for name in names]
    assert lines("gps/overlap", rows)[-1][-3:] == ("60.00", "66.70", "-6.70")
