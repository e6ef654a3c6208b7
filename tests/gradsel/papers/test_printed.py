"""The papers' numbers: complete, about methods and data that experiments have, and as consistent as the papers are."""

from __future__ import annotations

import pytest

from gradsel.experiments.papers import EXPERIMENTS
from gradsel.experiments.papers.sources import SOURCES
from gradsel.papers.printed import printed

#: Means that are not those of their rows, to two decimals: table, row, the paper's, and that of the row.
INCONSISTENT = {
    ("gps/table2", "VPT-Shallow"): (84.62, 84.66),
    ("gps/table2", "VPT-Deep"): (89.11, 89.10),
    ("grft/table1", "Full"): (89.44, 88.54),
    ("grft/table1", "GPS*"): (91.06, 91.08),
    ("grft/table1", "GRFT"): (91.33, 91.34),
    ("grft/table2", "GPS*"): (73.61, 73.62),
    ("grft/table4", "GPS*"): (91.06, 91.08),
    ("grft/table4", "GRFT-Sparse"): (91.13, 91.14),
    ("grft/table4", "GRFT-Row"): (91.29, 91.30),
    ("grft/table4", "GRFT-Column"): (91.27, 91.26),
    ("grft/table5", "Without Norm"): (91.10, 91.08),
    ("grft/table5", "L2 Norm"): (91.25, 91.24),
}


def test_every_table_belongs_to_an_experiment_and_has_its_methods_and_data():
    for name, table in printed().items():
        experiment = EXPERIMENTS[name]
        for row, values in table.rows.items():
            assert len(values) == len(table.columns), (name, row)
            if table.metric != "difference":
                assert row.rpartition(" + ")[2] in experiment.methods, (name, row)
        for column in table.columns:
            named = {model: column.removeprefix(f"{model} ") for model in experiment.models}
            known = {*SOURCES, "Mean", "Params. (%)", "Params. (M)", *experiment.metrics}
            assert known & {column, *named.values()}, (name, column)


@pytest.mark.parametrize(
    "name", ["gps/table2", "gps/table3", "gps/table9", "grft/table1", "grft/table2", "grft/table4", "grft/table5"]
)
def test_means_are_those_of_their_rows_but_for_these(name):
    table = printed()[name]
    count = table.columns.index("Mean")
    for row, values in table.rows.items():
        mean = sum(values[:count]) / count
        if (name, row) in INCONSISTENT:
            assert (values[count], round(mean, 2)) == INCONSISTENT[name, row]
        else:
            assert values[count] == pytest.approx(mean, abs=0.00501), row


def test_numbers_are_looked_up_in_our_units():
    assert printed()["gps/table2"].value("GPS", "CUB-200-2011") == 89.9
    assert printed()["grft/table3"].value("GRFT", "RTE") == pytest.approx(84.84)
    assert printed()["grft/table3"].value("GRFT", "Params. (%)") == 0.08
    assert printed()["gps/table10"].value("VPT-Deep", "ConvNeXt-B CIFAR-100") is None
    assert printed()["gps/table2"].value("nobody", "CUB-200-2011") is None
