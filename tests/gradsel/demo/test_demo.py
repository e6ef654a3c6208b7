"""The demo: its training loop, its results, the ablation and the command."""

from __future__ import annotations

import copy
import json
import math
import sys

import pytest
import torch

import gradsel
from gradsel.cli import main as cli
from gradsel.demo.training import fine_tune, jitter, warmup_cosine
from gradsel.papers.vit import VisionTransformer
from tests.support.vit import small

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("peft")
from gradsel.demo import ablation, data, demo

TINY = demo.Settings(dim=8, depth=1, heads=2, pretrain_epochs=1, shots=3, epochs=2)


# --- The loop ----------------------------------------------------------------------------------------------------


def test_schedule():
    rates = [warmup_cosine(step, 100, peak=1.0) for step in range(100)]
    assert rates[0] == 1e-7
    assert rates[5] == pytest.approx(0.5)
    assert rates[10] == 1.0 == max(rates)
    assert rates[55] == pytest.approx(0.5)
    assert rates[99] == pytest.approx((1 + math.cos(math.pi * 89 / 90)) / 2, abs=1e-7)
    assert sorted(rates[10:], reverse=True) == rates[10:]
    assert warmup_cosine(100, 100, peak=1.0) == pytest.approx(1e-8)
    assert warmup_cosine(0, 1, peak=1.0) == 1.0


def test_jitter_is_the_identity_at_zero_and_shifts_by_pixels():
    image = torch.rand(1, 1, 8, 8)
    generator = torch.Generator().manual_seed(0)
    torch.testing.assert_close(jitter(image, generator, 0, 0, 0), image)
    flat = torch.full((4, 1, 8, 8), 0.3)
    torch.testing.assert_close(jitter(flat, generator), flat)
    spots = torch.zeros(500, 1, 8, 8)
    spots[:, :, 4, 4] = 1.0
    moved = jitter(spots, generator, 1.0, 0, 0)
    torch.testing.assert_close(moved[:, :, 3:6, 3:6].sum((1, 2, 3)), torch.ones(500))  # by one pixel at most
    assert moved[:, 0, 3, 3].max() > 0.8  # but by a whole pixel in every direction
    assert moved[:, 0, 5, 5].max() > 0.8


def test_every_image_gets_its_own_jitter_and_the_same_for_a_seed():
    images = torch.rand(1, 1, 8, 8).expand(2, -1, -1, -1)
    first, again = (jitter(images, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first[0], first[1])


def test_masked_training_changes_only_what_is_selected():
    model = small()
    before = copy.deepcopy(model.state_dict())
    selection = gradsel.select(model, None, None, gradsel.PerNeuron(2), "random", progress=False)
    gradsel.freeze(model, selection)
    optimizer = gradsel.MaskedAdam(model.named_parameters(), masks=selection)
    history = fine_tune(model, optimizer, torch.randn(40, 1, 8, 8), torch.arange(40) % 5, epochs=3, lr=1e-2)
    assert len(history.losses) == len(history.seconds) == 6
    for name, after in model.state_dict().items():
        trained = selection[name].to_dense()
        assert torch.equal(after[~trained], before[name][~trained]), name
        if selection[name].nnz:
            assert not torch.equal(after[trained], before[name][trained]), name


# --- The demo ----------------------------------------------------------------------------------------------------


def test_splits_share_no_image_and_cover_the_classes():
    tuning, reported = (demo.split(demo.NEW, 3, part) for part in (demo.TUNING, demo.REPORTED))
    parts = [tuning.images, tuning.test_images, reported.images, reported.test_images]
    count = sum(map(len, parts))
    images, labels = data.digits()
    new = images[labels >= demo.NEW.start]
    assert count == len(new)
    assert len(torch.cat(parts).unique(dim=0)) == len(new.unique(dim=0))
    for labels in (tuning.labels, reported.labels):
        assert labels.bincount().tolist() == [3] * 5
    assert reported.test_labels.unique().tolist() == [0, 1, 2, 3, 4]


@pytest.fixture(scope="module")
def results():
    return demo.run(seeds=(0, 1), quiet=True, settings=TINY)


def test_the_same_seeds_give_the_same_results(results):
    again = demo.run(seeds=(0, 1), quiet=True, settings=TINY)
    for row, same in zip(results.rows, again.rows, strict=True):
        assert row.accuracies == same.accuracies
        assert row.used_columns() == same.used_columns()


def test_adapting_leaves_frozen_weights_and_the_pretrained_network_alone():
    pretrained, _ = demo.pretrain(TINY, quiet=True)
    before = copy.deepcopy(pretrained.state_dict())
    data = demo.split(demo.NEW, TINY.shots, demo.REPORTED)
    for method in demo.METHODS:
        model, _ = demo.adapt(pretrained, method, data, 0, epochs=2)
        for name, tensor in pretrained.state_dict().items():
            assert torch.equal(tensor, before[name])
        torch.manual_seed(0)
        fresh = copy.deepcopy(pretrained)
        fresh.reset_classifier(len(demo.NEW))
        selection = method.start(fresh, data, 0).selection
        if selection is None:
            continue
        for name, after in gradsel.detach(model).state_dict().items():
            frozen = ~selection[name].to_dense()
            assert torch.equal(after[frozen], before[name][frozen]), (method.name, name)


def test_costs_are_counted_as_documented(results):
    rows = {row.method: row.outcomes[0] for row in results.rows}
    total = rows["GPS K=1"].parameters
    neurons = 8 + 24 + 8 + 32 + 8  # patch embedding, qkv, proj, fc1, fc2; as many biases
    head = 9 * 5
    assert rows["linear probe"].trained == head
    assert rows["GPS K=3"].trained == 3 * neurons + neurons + head
    assert rows["GPS K=3"].delta_bytes == 6 * 3 * neurons + 4 * (neurons + head)
    assert rows["full fine-tuning"].trained == total
    assert rows["full fine-tuning"].delta_bytes == 4 * total
    tensors = len(list(VisionTransformer(8, 2, 1, 8, 1, 2, num_classes=5).parameters()))
    assert rows["full fine-tuning"].state_bytes == 8 * total + 4 * tensors  # two moments, and one step count per tensor
    assert rows["GPS K=1"].trained == rows["random K=1"].trained
    assert rows["GPS K=1"].used_columns.keys() == {
        "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.attn.proj.weight",
        "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight",
    }  # fmt: skip


def test_one_delta_is_saved_and_its_size_printed_beside_the_checkpoints(results):
    saved = results.delta
    assert saved.method == "GPS K=1"
    payload = results.rows[[row.method for row in results.rows].index("GPS K=1")].outcomes[0]
    assert payload.delta_bytes < saved.delta_bytes + 2 * payload.trained  # columns of few inputs are stored as bits
    assert saved.checkpoint_bytes > 4 * payload.parameters
    line = demo.saved_line(saved)
    assert f"{saved.delta_bytes:,} bytes" in line
    assert f"{saved.checkpoint_bytes:,}" in line


def test_a_delta_that_does_not_come_back_is_an_error(monkeypatch):
    pretrained, _ = demo.pretrain(TINY, quiet=True)
    data = demo.split(demo.NEW, TINY.shots, demo.REPORTED)
    gps = next(method for method in demo.METHODS if method.name == demo.SAVED)
    model, _ = demo.adapt(pretrained, gps, data, 0, epochs=1)
    demo.saved_bytes(model, demo.fresh(pretrained, 0))
    with torch.no_grad():
        model.norm.weight[0] += 1  # frozen, so no delta holds it
    with pytest.raises(RuntimeError, match="to the bit"):
        demo.saved_bytes(model, demo.fresh(pretrained, 0))


# --- The ablation ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ablated():
    return demo.run(seeds=(0,), quiet=True, settings=TINY, methods=ablation.VARIANTS)


def test_variants_train_about_as_many_weights_and_differ_in_which(ablated):
    neurons = 8 + 24 + 8 + 32 + 8
    rest = neurons + 9 * 5  # biases and head
    trained = {row.method: row.outcomes[0].trained - rest for row in ablated.rows}
    exact = [name for name in trained if name.startswith(("net", "neuron", "columns"))]
    assert len(exact) == 10
    assert all(trained[name] == neurons for name in exact)
    assert abs(trained["layer"] - neurons) <= 5  # each layer rounds
    assert trained["rows"] == trained["rows + L2: GRFT"] == 4 + 8 + 8 + 8 + 32  # one row of each matrix

    pretrained, _ = demo.pretrain(TINY, quiet=True)
    data = demo.split(demo.NEW, TINY.shots, demo.REPORTED)
    kinds, pulls = {}, {}
    for method in ablation.VARIANTS:
        task = method.start(copy.deepcopy(pretrained), data, 0)
        kinds[method.name] = {mask.kind for mask in task.selection.values() if mask.nnz and not mask.is_whole}
        pulls[method.name] = task.optimizer.defaults["anchor"]
    assert kinds["net"] == kinds["layer"] == kinds["net, random"] == {"irregular"}
    assert kinds["neuron: GPS"] == kinds["neuron, magnitude"] == kinds["neuron + L2"] == {"per-row"}
    assert kinds["rows"] == kinds["rows + L2: GRFT"] == {"rows"}
    assert kinds["columns"] == kinds["columns + L2: GRFT"] == {"columns"}
    assert {name for name, pull in pulls.items() if pull} == {name for name in pulls if "L2" in name}


def test_the_ablation_prints_every_variant_and_its_distance_to_gps(ablated, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(ablation, "run", lambda seeds, quiet: ablated)
    picture = tmp_path / "ablation.png"
    assert cli.main(["demo", "--ablation", "--quiet", "--output", str(picture)]) == 0
    printed = capsys.readouterr().out
    gps = next(row for row in ablated.rows if row.method == "neuron: GPS")
    for row in ablated.rows:
        line = next(line for line in printed.splitlines() if line.startswith(f"  {row.method} "))
        assert f"{row.mean - gps.mean:+.1f}" in line
    assert picture.read_bytes().startswith(b"\x89PNG")
    record = json.loads((tmp_path / "ablation.json").read_text())
    assert [row["method"] for row in record["rows"]] == [method.name for method in ablation.VARIANTS]


# --- The command line --------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_writes_its_files(results, monkeypatch, tmp_path, capsys):
    asked = []

    def run(seeds, quiet):
        asked.append((seeds, quiet))
        return results

    monkeypatch.setattr(demo, "run", run)
    picture = tmp_path / "new" / "picture.png"
    assert cli.main(["demo", "--seeds", "0", "1", "--quiet", "--output", str(picture)]) == 0
    assert asked == [([0, 1], True)]
    printed = capsys.readouterr().out
    assert demo.saved_line(results.delta) in printed
    for method in demo.METHODS:
        assert method.name in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    record = json.loads((tmp_path / "new" / "results.json").read_text())
    assert [row["method"] for row in record["rows"]] == [method.name for method in demo.METHODS]
    assert record["rows"][0]["outcomes"][1]["accuracy"] == results.rows[0].accuracies[1]


@pytest.mark.parametrize("package", ["sklearn", "matplotlib"])
def test_a_missing_package_is_named_with_what_to_install(package, monkeypatch, capsys):
    for module in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    for module in [f"gradsel.demo.{name}" for name in ("ablation", "data", "demo", "methods", "plots")]:
        monkeypatch.delitem(sys.modules, module)
    for name in ("ablation", "data", "demo", "methods", "plots"):
        monkeypatch.delattr(gradsel.demo, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert cli.main(["demo"]) == 2
    message = capsys.readouterr().err
    assert package in message
    assert "pip install 'gradsel-kernels[demo]'" in message
