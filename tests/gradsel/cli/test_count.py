"""``gradsel count``: the papers' tables and one setting."""

from __future__ import annotations

import re
import sys

import pytest

from gradsel.cli import main as cli


def test_prints_both_tables(capsys):
    pytest.importorskip("transformers")
    assert cli.main(["count"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("data set ") for line in lines) == 2
    cells = [line.split() for line in lines]
    assert ["Pets", "vit-b-16", "37", "PerNeuron(k=1)", "195,877", "0.2282", "0.23", "%", "-0.0018"] in cells
    assert ["Pets", "vit-b-16", "37", "Rows(k=2)", "242,725", "0.2828", "0.28", "%", "+0.0028"] in cells
    assert ["RTE", "llama-3.2-1b", "2", "Rows(k=3)", "987,136", "0.0799", "0.08", "%", "-0.0001"] in cells
    assert any(line.startswith("NABirds") and line.endswith("Tab. 7 says 10") for line in lines)
    assert not any("Left out" in line for line in lines)


def test_tables_without_transformers_say_what_is_left_out(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert cli.main(["count"]) == 0
    printed = capsys.readouterr().out
    assert "Pets" in printed
    assert "RTE" not in printed
    assert "Left out: the rows of swin-b, convnext-b, llama-3.2-1b, which need transformers: pip install" in printed


@pytest.mark.parametrize(
    ("policy", "ranked"),
    [
        ("per-neuron:5", 5 * 83_712),
        ("rows:3", 3 * 65_280),
        ("columns:2", 2 * 83_712),
        ("per-layer:0.01", 855_246),  # 1 % of 12 x (1,769,472 + 589,824 + 2 x 2,359,296) + 589,824, each rounded
        ("global:0.001", 85_524),
    ],
)
def test_one_setting_with_its_breakdown(policy, ranked, capsys):
    assert cli.main(["count", "--model", "vit-b-16", "--policy", policy, "--classes", "100"]) == 0
    cells = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["ranked", f"{ranked:,}", "of", "85,524,480"] in cells
    assert ["bias", "83,712", "whole"] in cells
    assert ["head", "76,900", "whole"] in cells
    trained = ranked + 83_712 + 76_900
    assert ["all", f"{trained:,}", "of", "85,875,556", f"({100 * trained / 85_875_556:.3f}", "%)"] in cells


def test_one_setting_by_default_is_vit_on_imagenet(capsys):
    assert cli.main(["count", "--policy", "per-neuron:1"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("vit-b-16 with 1,000 classes, PerNeuron(k=1)\n")
    assert "769,000" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "rowz:3"], "'rowz:3' .*per-neuron:K, by-mass:K, rows:K, columns:K, per-layer:F"),
        (["--policy", "rows"], "'rows' .*per-neuron:K"),
        (["--policy", "rows:x"], "rows:x .*'x' .*>= 1"),
        (["--policy", "columns:0"], "columns:0 .*'0' .*>= 1"),
        (["--policy", "global:1.5"], r"global:1\.5 .*'1\.5' .*0 .*1"),
        (["--policy", "per-layer:nan"], "per-layer:nan .*'nan' .*0 .*1"),
        (["--policy", "rows:1", "--classes", "0"], "'0' .*classes.*>= 1"),
        (["--policy", "rows:1", "--model", "vit"], "'vit'"),
        (["--model", "swin-b"], "--model .*--policy.*per-neuron:K"),
        (["--classes", "10"], "--classes .*--policy.*per-neuron:K"),
    ],
)
def test_a_bad_value_is_named_with_what_was_expected(arguments, message, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["count", *arguments])
    assert left.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_model_without_transformers_names_the_package(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert cli.main(["count", "--policy", "rows:1", "--model", "swin-b"]) == 2
    assert "pip install 'gradsel-kernels[bench]'" in capsys.readouterr().err
