"""Every method trains what it says, bit for bit nothing else, and its result is the same model elsewhere."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("timm")
pytest.importorskip("transformers")
pytest.importorskip("peft")
import gradsel
from gradsel import methods
from gradsel.methods import METHODS, Context, Method, method
from gradsel.methods.selected import head_only
from gradsel.training import Trainer
from tests.support import tiny

EVERY = {
    "gps": method("gps", k=2),
    "gps-columns": method("gps", k=1, columns=4),
    "gps-random": method("gps", criterion="random"),
    "gps-cross-entropy": method("gps", loss="cross-entropy"),
    "grft": method("grft", rows=2, anchor=1e-2, anchor_blocks=1),
    "grft-columns": method("grft", columns=1),
    "grft-sparse": method("grft", sparse=1),
    "full": method("full"),
    "linear": method("linear"),
    "bias": method("bias"),
    "lora": method("lora", rank=2),
}
DATA = {"timm": (tiny.vit, tiny.images), "transformers": (tiny.bert, tiny.texts)}


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return model(inputs["pixel_values"]) if "pixel_values" in inputs else model(**inputs).logits


def train(how: Method, model: nn.Module, batches: list[dict[str, Tensor]]) -> None:
    optimizer = how.optimizer(model, lr=1e-2)
    for batch in batches:
        F.cross_entropy(logits(model, batch), batch["labels"]).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(params=DATA)
def family(request):
    make, data = DATA[request.param]
    return make, data()


@pytest.mark.parametrize("how", EVERY.values(), ids=EVERY)
def test_trains_what_it_says_and_its_result_is_the_same_model_elsewhere(how, family, tmp_path):
    make, batches = family
    model = make()
    before = copy.deepcopy(model.state_dict())
    prepared = how.prepare(model, batches)
    assert prepared.total == sum(tensor.numel() for tensor in make().parameters())
    trainable = sum(p.numel() for p in prepared.model.parameters() if p.requires_grad)
    assert prepared.trained == trainable
    assert prepared.share == 100 * trainable / prepared.total
    train(how, prepared.model, batches)
    after = {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): tensor
        for name, tensor in prepared.model.state_dict().items()
    }
    moved = 0
    for name, old in before.items():
        if prepared.selection is None or name not in prepared.selection:
            continue
        mask = prepared.selection[name].to_dense()
        if name not in after:  # PEFT keeps the old head beside the new one
            assert isinstance(how, methods.Lora)
            assert mask.all()
            continue
        assert torch.equal(after[name][~mask], old[~mask]), name
        moved += int((after[name][mask] != old[mask]).sum())
    assert moved or prepared.selection is None or isinstance(how, methods.Lora)

    how.save(prepared, tmp_path)
    loaded = how.load(make(), tmp_path)
    with torch.no_grad():
        prepared.model.eval(), loaded.eval()
        assert torch.equal(logits(loaded, batches[1]), logits(prepared.model, batches[1]))
        assert not torch.equal(logits(loaded, batches[1]), logits(make(), batches[1]))


def test_numbers_of_trained_parameters():
    """The formulas of the papers' tables, for a tiny ViT: d = 24, 2 blocks, 3 classes, a patch of 192 numbers."""

    def count(how):
        return how.prepare(tiny.vit(), tiny.images()).trained

    neurons = 24 + 2 * (72 + 24 + 96 + 24)
    columns_of_one = 24 + 2 * (72 + 24 + 96 + 24)
    rows_of_one = 192 + 2 * (24 + 24 + 24 + 96)
    head = 25 * 3
    assert count(method("linear")) == head
    assert count(method("gps", k=3)) == 3 * neurons + neurons + head
    assert count(method("grft", rows=2)) == 2 * rows_of_one + neurons + head
    assert count(method("grft", columns=2)) == 2 * columns_of_one + neurons + head
    assert count(method("bias")) == neurons + 5 * 24 + head
    inputs_and_outputs = 2 * ((24 + 72) + (24 + 24) + (24 + 96) + (96 + 24))
    assert count(method("lora", rank=2)) == 2 * inputs_and_outputs + head


def test_the_pull_reaches_the_last_blocks_the_patches_and_the_head():
    how = method("grft", rows=1, anchor=0.5, anchor_blocks=1)
    model = how.prepare(tiny.vit(), tiny.images()).model
    pulled = {name for name, _ in how.groups(model)[0]["params"]}
    assert {name.split(".")[0] for name in pulled} == {"patch_embed", "blocks", "head"}
    assert not any(name.startswith("blocks.0") for name in pulled)
    assert [group["anchor"] for group in how.optimizer(model, 1e-3).param_groups] == [0.5, 0.0]


def test_the_pull_reaches_a_head_with_an_unusual_name(tmp_path):
    how = method("grft", rows=1, anchor=0.5, anchor_blocks=0)
    model = tiny.vit()
    model.decide = model.head
    del model.head
    model.forward = lambda inputs: model.decide(model.forward_head(model.forward_features(inputs), pre_logits=True))
    gradsel.attach(model, head_only(model, ["decide"]))
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    trainer = Trainer(model, arguments, method=how, head=["decide"])
    assert [group["anchor"] for group in trainer.create_optimizer().param_groups] == [0.5]
    pulled = [group for group in how.optimizer(model, 1e-3, head=["decide"]).param_groups if group["anchor"]]
    assert {name for group in pulled for name in group["param_names"]} == {"decide.weight", "decide.bias"}
    assert all(group["anchor"] == 0 for group in how.optimizer(model, 1e-3).param_groups)


@pytest.mark.parametrize("norm", [1, 2])
def test_the_pull_has_the_norm_that_is_asked_for(norm):
    how = method("grft", rows=1, anchor=0.5, anchor_norm=norm)
    model = how.prepare(tiny.vit(), tiny.images()).model
    assert {group["anchor_norm"] for group in how.optimizer(model, 1e-3).param_groups} == {norm}


def test_grft_selects_on_the_easiest_part_of_the_data():
    batch = tiny.images(24)[0]
    data = [{name: value[i] for name, value in batch.items()} for i in range(24)]

    def batches_of(part):
        return torch.utils.data.DataLoader(part, batch_size=8)

    context = Context(dataset=data, batches_of=batches_of, seed=3)
    how = method("grft", rows=1, subsets=3)
    chosen = how.prepare(tiny.vit(), batches_of(data), context).selection
    model = tiny.vit()
    part = gradsel.easiest_subset(model, data, how.loss_for(model, False), 3, batches=batches_of, seed=3)
    expected = gradsel.select(model, batches_of(part), how.loss_for(model, False), gradsel.Rows(1))
    assert chosen == expected
    assert chosen.notes["data subset"] == f"{part.part + 1} of 3"


def test_two_views_of_each_sample_count_as_samples():
    views = [{**batch, "pixel_values": torch.stack([batch["pixel_values"]] * 2, 1)} for batch in tiny.images()]
    doubled = [
        {"pixel_values": batch["pixel_values"].flatten(0, 1), "labels": batch["labels"].repeat_interleave(2)}
        for batch in views
    ]
    for how in (method("gps"), method("gps", loss="cross-entropy")):
        one = how.prepare(tiny.vit(), views, Context(views=True)).selection
        assert one == how.prepare(tiny.vit(), doubled).selection


@pytest.mark.parametrize("how", [method("gps"), method("linear"), method("lora")], ids=str)
def test_a_result_is_refused_by_another_base(how, tmp_path):
    prepared = how.prepare(tiny.vit(), tiny.images())
    how.save(prepared, tmp_path)
    other = tiny.vit()
    with torch.no_grad():
        other.blocks[0].mlp.fc1.weight[0, 0] += 1
    with pytest.raises(ValueError, match="differ from the weights this selection was made on"):
        how.load(other, tmp_path)


def test_a_new_head_of_another_seed_is_replaced(tmp_path):
    how = method("gps")
    prepared = how.prepare(tiny.vit(), tiny.images())
    how.save(prepared, tmp_path)
    other = tiny.vit()
    torch.nn.init.normal_(other.head.weight)
    assert torch.equal(how.load(other, tmp_path).head.weight, prepared.model.head.weight)


def test_running_statistics_are_part_of_the_result(tmp_path):
    def network():
        torch.manual_seed(0)
        return nn.ModuleDict({"body": nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), "head": nn.Linear(4, 3)})

    for how in (method("linear"), method("full")):
        model = network()
        prepared = how.prepare(model)
        model["body"](torch.randn(4, 3, 8, 8))
        how.save(prepared, tmp_path)
        loaded = how.load(network(), tmp_path)
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name]), name
        assert not torch.equal(loaded["body"][1].running_mean, network()["body"][1].running_mean)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: method("gpz"), "'gpz'; did you mean gps"),
        (lambda: method("gps", kk=1), "gps has no option 'kk'; did you mean k"),
        (lambda: method("full", k=1), "full has no option 'k'; it has none"),
        (lambda: method("gps", k=0), "k >= 1, got 0"),
        (lambda: method("gps", criterion="gradent"), "criterion is 'gradent'.*did you mean gradient"),
        (lambda: method("grft", rows=1, columns=1), "rows and columns"),
        (lambda: method("grft", subsets=0), "subsets .*>= 1"),
        (lambda: method("grft", anchor=-1.0), "anchor .*-1"),
        (lambda: method("grft", anchor_norm=3), "anchor_norm must be 1 or 2, got 3"),
        (lambda: method("lora", rank=0), "rank .*>= 1"),
        (lambda: method("gps").prepare(tiny.vit()), "gps .*pass batches"),
    ],
)
def test_what_cannot_be_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_every_method_has_one_line_about_itself_and_each_option():
    import dataclasses

    for name, kind in METHODS.items():
        assert kind.name == name
        assert kind.summary
        assert all(option.metadata["help"] for option in dataclasses.fields(kind))
        assert method(name, **method(name).options()) == method(name)
