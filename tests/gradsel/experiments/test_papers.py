"""The papers' experiments: every one runs on tiny data, goes on where it stopped, and says what it lacks."""

from __future__ import annotations

import csv
import json
import math

import datasets
import pytest
import torch

from gradsel.cli import main as cli
from gradsel.errors import RunError
from gradsel.experiments import working
from gradsel.experiments.cost import comparing, vit
from gradsel.experiments.papers import EXPERIMENTS, experiment, measures, run
from gradsel.experiments.papers.estimating import described
from gradsel.experiments.papers.sparse import SparsePull
from gradsel.papers.presets import GPS
from gradsel.papers.printed import printed
from gradsel.training.config import read_config
from tests.support import data_roots, masks, pretrained, tiny

VIT = {
    "model.name": "vit_tiny_patch16_224", "model.weights": "none", "model.options": dict(tiny.VIT),
    "recipe.epochs": 1, "recipe.batch_size": 4, "device": "cpu",
}  # fmt: skip
#: What of each experiment runs here; the first run of every method of a table is in one of them.
SOME = {
    "gps/table2": "cub,gps,spt-lora",
    "gps/table3": "dtd,gps,full",
    "gps/table4": "dogs,swin-b,gps",
    "gps/table5": "linear,gps,full",
    "gps/table6": "cars,net,head+ce",
    "gps/table8": "vpt-shallow",
    "gps/table9": "nabirds,convnext-b,ssf",
    "gps/table10": "vit-b/16,gps",
    "gps/table11": "vit-b/16,bias",
    "gps/fig4": "flowers,K=1,K=15",
    "gps/fig5": "linear,shots=2",
    "gps/blocks": "all,without 2",
    "gps/distribution": "cub",
    "gps/overlap": "dtd,eurosat,clevr/count",
    "gps/tsne": "gps",
    "gps/regularized": "lambda=0.3",
    "gps/cost": "",
    "grft/table1": "flowers,gps*,grft",
    "grft/table2": "caltech101,grft,adapter",
    "grft/table3": "rte,grft,lora",
    "grft/table4": "cub,grft-sparse,grft-row,grft-column",
    "grft/table5": "cub,without norm,l1 norm",
    "grft/fig3": "cub,grft",
    "grft/fig4-rows": "cub,grft-column,k=3",
    "grft/fig4-lambda": "cub,lambda=1e-3",
    "grft/fig4-blocks": "cub,blocks=2",
    "grft/fig4-subsets": "cub,n=2",
    "grft/masks": "vit-b/16,k=3",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return data_roots.every(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def patched(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets-cache")
    monkeypatch.setattr("torchvision.datasets.CIFAR100._check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    wanted = ("full fine-tuning", "LoRA", "GPS, attached")
    every = vit.for_vit
    monkeypatch.setattr(vit, "for_vit", lambda *a: [each for each in every(*a) if each.name in wanted])
    monkeypatch.setattr(vit, "check", lambda *_: "")
    monkeypatch.setattr(vit, "PRETRAINING", 2)
    monkeypatch.setattr(comparing, "WARM_UP", 1)
    monkeypatch.setattr(comparing, "FEWEST", 2)
    monkeypatch.setattr(comparing, "peak_bytes", lambda start, cuda: 2**20)  # a profiler's run of each takes seconds


def settings_for(name, folder):
    if name == "gps/table5":
        return {"model.name": str(masks.sam_folder(folder / "sam")), "recipe.epochs": 1, "device": "cpu"}
    if name == "grft/table3":
        llama = pretrained.llama(folder / "llama", ["the fine thing a cold great broken here as told"])
        return {"model.name": str(llama), "recipe.epochs": 1, "recipe.batch_size": 4, "device": "cpu"}
    return dict(VIT)


def rows(folder):
    return list(csv.DictReader((folder / "results.csv").open()))


def only(text):
    return [each for each in text.split(",") if each]


def test_every_experiment_is_run_here():
    assert SOME.keys() == EXPERIMENTS.keys()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_runs_on_tiny_data(name, root, tmp_path):
    found = run(
        experiment(name),
        root,
        tmp_path / "out",
        only(SOME[name]),
        1,
        settings_for(name, tmp_path),
        small=True,
        quiet=True,
    )
    written = rows(tmp_path / "out")
    assert len(written) == len(found.rows) > 0
    assert all(math.isfinite(float(row["value"])) for row in written)
    for metric in experiment(name).metrics:
        assert metric in {row["metric"] for row in written}, metric
    assert (tmp_path / "out" / "table.md").read_text().startswith(experiment(name).source)
    cells = experiment(name).cells(only(SOME[name]), 1)
    assert {(row["method"], row["data"], row["setting"]) for row in written} == {
        (cell.method, cell.data, cell.setting) for cell in cells
    }


def test_it_goes_on_where_it_stopped(root, tmp_path, monkeypatch):
    begun, original = [], working.finetune

    def finetune(config, **options):
        if len(begun) == 1 and stops:
            raise KeyboardInterrupt
        begun.append(config.output.folder)
        return original(config, **options)

    monkeypatch.setattr(working, "finetune", finetune)
    out, stops = tmp_path / "out", True
    with pytest.raises(KeyboardInterrupt):
        run(experiment("gps/table2"), root, out, ["cub", "linear", "bias"], given=VIT, quiet=True)
    assert {row["method"] for row in rows(out)} == {"Linear"}
    stops = False
    run(experiment("gps/table2"), root, out, ["cub", "linear", "bias"], given=VIT, quiet=True)
    assert len(begun) == 2
    before = (out / "results.csv").read_text()
    run(experiment("gps/table2"), root, out, ["cub", "linear", "bias"], given=VIT, quiet=True)
    assert len(begun) == 2
    assert (out / "results.csv").read_text() == before
    with pytest.raises(RunError, match="has gps/table2 with the settings"):
        run(experiment("gps/table2"), root, out, ["cub", "linear"], given={**VIT, "recipe.epochs": 2}, quiet=True)
    with pytest.raises(RunError, match="has gps/table2 with the settings"):
        run(experiment("gps/table6"), root, out, ["cub", "net"], given=VIT, quiet=True)


def test_what_was_measured_is_read_the_next_time(tmp_path, monkeypatch):
    first = run(experiment("grft/masks"), None, tmp_path, only(SOME["grft/masks"]), given=VIT, quiet=True)
    monkeypatch.delitem(measures.MEASURES, "masks")
    again = run(experiment("grft/masks"), None, tmp_path, only(SOME["grft/masks"]), given=VIT, quiet=True)
    assert again.rows == first.rows


def test_finished_runs_of_other_data_are_refused(tmp_path):
    birds = data_roots.cub(tmp_path / "data" / "CUB_200_2011")
    out, asked = tmp_path / "out", ["cub", "linear"]

    def once():
        return run(experiment("gps/table2"), tmp_path / "data", out, asked, given=VIT, quiet=True)

    first = once()
    assert once().rows == first.rows
    image = next((birds / "images").rglob("*.jpg"))
    before = image.read_bytes()
    data_roots.picture(image, 1000)
    with pytest.raises(RunError, match=r"data\.path: .*CUB.* has changed since the run in .* ended: the \w+ set"):
        once()
    image.write_bytes(before)
    assert once().rows == first.rows
    kept = next(out.rglob("measured.json"))
    kept.write_text(json.dumps({key: value for key, value in json.loads(kept.read_text()).items() if key != "data"}))
    assert once().rows == first.rows  # an older version's


def test_few_shots_are_as_many_of_each_class_for_every_method(root, tmp_path):
    run(experiment("gps/fig5"), root, tmp_path / "out", ["linear", "bias", "shots=2"], given=VIT, quiet=True)
    drawn = [list(csv.DictReader(path.open())) for path in sorted((tmp_path / "out").glob("data/*/train.csv"))]
    assert len(drawn) == 1
    configs = [read_config(path) for path in (tmp_path / "out").glob("runs/*/run/config.yaml")]
    assert len(configs) == 2
    assert len({config.data.path for config in configs}) == 1
    labels = [row["label"] for row in drawn[0]]
    assert all(labels.count(label) == 2 for label in labels)
    assert len(labels) == 6


def test_a_pull_keeps_weights_where_they_were(root, tmp_path):
    found = run(experiment("gps/regularized"), root, tmp_path, ["lambda=0", "lambda=1"], given=VIT, quiet=True)
    moved = {row.setting: row.value for row in found.rows if row.metric == "moved"}
    assert moved["lambda=0"] > 99
    assert moved["lambda=1"] < 50


def test_the_pull_is_soft_thresholding_of_what_moved():
    model = torch.nn.Linear(3, 1)
    base = {"weight": torch.tensor([[1.0, 2.0, 3.0]])}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.04, 1.8, 3.2]]))
        model.bias.fill_(7.0)
    SparsePull(base, 0.5).on_optimizer_step(None, None, None, model=model, optimizer=optimizer)
    assert model.weight[0, 0] == 1.0
    torch.testing.assert_close(model.weight.data, torch.tensor([[1.0, 1.85, 3.15]]))
    assert model.bias == 7.0


def test_what_varies_is_in_the_runs(root, tmp_path):
    run(experiment("grft/table4"), root, tmp_path, ["cub"], given=VIT, quiet=True)
    methods = {row["method"]: json.loads(row["config"]) for row in rows(tmp_path)}
    assert methods["GPS*"]["k"] == GPS["CUB-200-2011"].policy.k
    kinds = {"GRFT-Sparse": "sparse", "GRFT-Row": "rows", "GRFT-Column": "columns"}
    for name, kind in kinds.items():
        assert {each: methods[name][each] for each in kinds.values()} == {
            each: 2 if each == kind else None for each in kinds.values()
        }
        assert methods[name]["anchor"] == 1e-3


def test_data_that_lack_are_left_out_and_named(root, tmp_path, capsys):
    run(experiment("gps/table3"), root, tmp_path / "out", ["dtd", "pets", "linear"], given=VIT)
    told = capsys.readouterr().err
    assert "left out, 1 runs: Pets from the 1,000 images and lists of VTAB-1k" in told
    assert {row["data"] for row in rows(tmp_path / "out")} == {"DTD"}
    with pytest.raises(RunError, match=r"no data set of it is below .*; it takes Pets from the 1,000 images"):
        run(experiment("gps/table3"), root, tmp_path / "other", ["pets"], given=VIT)
    with pytest.raises(RunError, match="needs data; pass --data with the folder that has Pets"):
        run(experiment("gps/table3"), None, tmp_path / "other", ["pets"], given=VIT)
    with pytest.raises(RunError, match=r"gps/table3 has no 'dtt'; it has ViT-B/16, Full, .*; did you mean dtd"):
        run(experiment("gps/table3"), root, tmp_path / "other", ["dtt"], given=VIT)
    with pytest.raises(ValueError, match="no experiment 'gps/tabel2'; did you mean gps/table2"):
        experiment("gps/tabel2")
    assert not (tmp_path / "other").exists()


def test_a_run_that_fails_is_told_after_the_others(root, tmp_path, monkeypatch, capsys):
    original = working.finetune

    def finetune(config, **options):
        if config.method.name == "linear":
            raise RunError("head.weight has values that are not finite")
        return original(config, **options)

    monkeypatch.setattr(working, "finetune", finetune)
    with pytest.raises(RunError, match=r"1 of 2 runs failed \(ViT-B/16, Linear, CUB-200-2011: head\.weight has values"):
        run(experiment("gps/table2"), root, tmp_path, ["cub", "linear", "bias"], given=VIT)
    assert {row["method"] for row in rows(tmp_path)} == {"Bias"}
    assert "| ViT-B/16 | Bias | CUB-200-2011 |" in (tmp_path / "table.md").read_text()
    assert "Linear, CUB-200-2011: failed, head.weight" in capsys.readouterr().err


def test_methods_that_do_not_fit_a_model_are_no_runs():
    cells = experiment("gps/table10").cells()
    assert not [cell for cell in cells if cell.model == "ConvNeXt-B" and cell.method.startswith("VPT")]
    assert [cell for cell in cells if cell.model == "Swin-B" and cell.method == "VPT-Deep"]
    with pytest.raises(ValueError, match="--only: VPT-Deep does not fit ConvNeXt-B"):
        experiment("gps/table10").cells(["vpt-deep", "convnext-b"])


def test_the_command(root, tmp_path, capsys):
    assert cli.main(["papers", "list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == list(EXPERIMENTS)
    options = [f"--model-option={name}={value}" for name, value in tiny.VIT.items()]
    vit = ["--model", "vit_tiny_patch16_224", "--weights", "none", *options, "--device", "cpu", "--epochs", "1"]
    shared = ["gps/table2", "--data", str(root), "--only", "cub,linear", *vit]
    assert cli.main(["papers", "show", *shared, "--measure"]) == 0
    shown = capsys.readouterr().out
    assert f"data: CUB-200-2011 in {root / 'CUB_200_2011'}" in shown
    assert "s a step; loading is not counted" in shown
    assert cli.main(["papers", "run", *shared, "--batch-size", "4", "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "| ViT-B/16 | Linear | CUB-200-2011 |  | top1 |" in printed
    assert cli.main(["papers", "run", "gps/tabel2"]) == 1
    assert "did you mean gps/table2" in capsys.readouterr().err


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_described_without_data(name):
    found = experiment(name)
    shown = described(found, None)
    for data in found.needed(found.cells()):
        assert f"lacks: {data} from " in shown
    assert ("\nsteps: " in shown) != ("cost: nothing is trained" in shown)
    assert ("\npaper: numbers of " in shown) == (name in printed())


def test_what_the_papers_do_not_print_is_said():
    for name, said in (
        ("gps/table2", "numbers of GPS, Tab. 2\n"),
        ("gps/table4", "numbers of GPS, Tab. 4; not printed: CUB-200-2011, NABirds, Oxford Flowers, "),
        ("gps/table5", "lacks the rows of Tab. 5; not printed: the numbers of each method\n"),
        ("gps/table9", "numbers of GPS, Tab. 9\n"),
        ("gps/fig4", "no numbers are printed"),
    ):
        assert said in described(experiment(name), None), name


def test_steps_are_those_of_the_recipe(root):
    shown = described(experiment("gps/table2"), root, ["cub", "gps"])
    assert f"steps: {math.ceil(5994 / 32) * 110:,} in all, and 5,794 samples to test" in shown
    shown = described(experiment("gps/fig5"), None, ["gps", "shots=4"], given={"recipe.epochs": 10})
    assert f"steps: {4000 // 32 * 10:,} in all" in shown


def test_what_cannot_be_measured_is_unknown(root):
    assert "hours here: unknown" in described(experiment("gps/table2"), None, ["cub", "linear"])
    given = {"model.name": "timm/nobody_knows", "model.weights": "none"}
    shown = described(experiment("gps/table2"), None, ["cub", "linear"], given=given, measure=True)
    assert "unknown for ViT-B/16, Linear (" in shown
    assert "nothing is trained" in described(experiment("grft/masks"), None)
