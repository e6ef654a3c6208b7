"""The optimizer that transformers' Trainer makes: it trains the selection, decays and clips as it should."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

import gradsel
from gradsel.integrations.transformers import masked_adamw
from tests.support import tiny

STEPS, BATCH = 4, 4


def data():
    batch = tiny.texts(STEPS * BATCH)[0]
    return [{name: tensor[n] for name, tensor in batch.items()} for n in range(STEPS * BATCH)]


def model():
    found = tiny.bert()
    for module in found.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return found


def select(model, **options):
    return gradsel.select(model, tiny.texts(), gradsel.contrastive(), **options)


def arguments(folder, **changes):
    settings = {
        "max_steps": STEPS, "per_device_train_batch_size": BATCH, "save_strategy": "no", "learning_rate": 1e-2,
        "use_cpu": True, "report_to": "none", "disable_tqdm": True, "weight_decay": 0.1, "max_grad_norm": 0.05,
        "adam_beta2": 0.99, "lr_scheduler_type": "constant", "logging_steps": 1, **changes,
    }  # fmt: skip
    return transformers.TrainingArguments(output_dir=str(folder), **settings)


def trained(model, folder, changes=None, **options):
    settings = arguments(folder, **(changes or {}))
    factory = masked_adamw(settings, **options)
    trainer = transformers.Trainer(model, settings, train_dataset=data(), optimizer_cls_and_kwargs=factory)
    trainer.train()
    return trainer


def norms(trainer):
    return [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]


def check_selected_moved(model, before, selection):
    for name, mask in selection.items():
        parameter, dense = model.get_parameter(name), mask.to_dense()
        assert torch.equal(parameter[~dense], before[name][~dense]), name
        assert not mask.nnz or not torch.equal(parameter[dense], before[name][dense]), name


def test_an_attached_model_and_masks_train_the_same(tmp_path):
    first, second = model(), model()
    before = copy.deepcopy(first.state_dict())
    selection = select(first)
    gradsel.attach(first, selection)
    ours = trained(first, tmp_path)
    theirs = trained(second, tmp_path, masks=selection)
    gradsel.detach(first)
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)
    check_selected_moved(second, before, selection)
    assert isinstance(theirs.optimizer.optimizer, gradsel.MaskedAdamW)
    # What Trainer logs, and clips by, is the norm of selected entries.
    norms = [
        [entry["grad_norm"] for entry in each.state.log_history if "grad_norm" in entry] for each in (ours, theirs)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert min(norms[0]) > 0.05


def test_the_first_step_selects(tmp_path):
    found = model()
    before = copy.deepcopy(found.state_dict())
    rules = {"freeze": ["*.embeddings.*"]}
    trainer = trained(found, tmp_path, policy=gradsel.PerNeuron(2), rules=rules)
    selection = trainer.optimizer.optimizer.selection
    assert selection.trainable_count() > 0
    check_selected_moved(found, before, selection)
    assert not any(selection[name].nnz for name in selection if ".embeddings." in name)
    batch = {name: torch.stack([row[name] for row in data()[:BATCH]]) for name in data()[0]}
    found(**batch).loss.backward()
    for name, parameter in found.named_parameters():
        if parameter.grad is not None and not selection[name].is_whole and selection[name].nnz:
            assert not parameter.grad[~selection[name].to_dense()].any(), name
            assert parameter.grad.any(), name
    assert len(norms(trainer)) == STEPS


def test_decay_and_options_are_those_of_the_arguments(tmp_path):
    found = model()
    gradsel.attach(found, select(found))
    trainer = transformers.Trainer(
        found, settings := arguments(tmp_path), train_dataset=data(),
        optimizer_cls_and_kwargs=masked_adamw(settings, eps=1e-6, anchor=1e-3),
    )  # fmt: skip
    groups = trainer.create_optimizer().param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all("bias" not in name and "LayerNorm" not in name for name in groups[0]["param_names"])
    assert any(name.endswith("weight_values") for name in groups[0]["param_names"])
    assert all("bias" in name for name in groups[1]["param_names"])
    assert {p for group in groups for p in group["params"]} == set(gradsel.trainable_parameters(found))
    for group in groups:
        assert (group["lr"], group["betas"], group["eps"], group["anchor"]) == (1e-2, (0.9, 0.99), 1e-6, 1e-3)


def test_masks_freeze_what_they_do_not_train(tmp_path):
    found = model()
    selection = select(found)
    settings = arguments(tmp_path)
    trainer = transformers.Trainer(
        found, settings, train_dataset=data(), optimizer_cls_and_kwargs=masked_adamw(settings, masks=dict(selection))
    )
    trainer.create_optimizer()
    for name, parameter in found.named_parameters():
        assert parameter.requires_grad == bool(selection[name].nnz), name


def test_what_trains_nothing_or_too_much_is_refused(tmp_path):
    settings = arguments(tmp_path)
    selection = select(model())

    def made(model, **options):
        factory, given = masked_adamw(settings, **options)
        return factory()(model, **given)

    with pytest.raises(ValueError, match="nothing says what is trained"):
        made(model())
    with pytest.raises(ValueError, match="masks and policy are both given"):
        made(model(), masks=selection, policy=gradsel.PerNeuron(1))
    with pytest.raises(TypeError, match="no option 'momentum'; it has amsgrad"):
        made(model(), masks=selection, momentum=0.9)
    with pytest.raises(ValueError, match=r"reselect_every ranks dense gradients, and max_grad_norm=0\.05"):
        made(model(), policy=gradsel.PerNeuron(1), reselect_every=2)
    attached = model()
    gradsel.attach(attached, selection)
    for options, what in (({"masks": selection}, "masks"), ({"policy": gradsel.PerNeuron(1)}, "policy")):
        with pytest.raises(ValueError, match=f"{what} is given, but the model is attached"):
            made(attached, **options)
    with pytest.raises(KeyError, match="made for another model"):
        made(model(), masks={"other": selection["classifier.bias"]})
    settings.max_grad_norm = 0.0
    made(model(), policy=gradsel.PerNeuron(1), reselect_every=2)
