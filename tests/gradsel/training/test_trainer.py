"""The Trainer in a script of one's own: small checkpoints, resumed bit for bit, the best one loaded."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import load_file

import gradsel
from gradsel.training import Trainer
from gradsel.training.saving import last_checkpoint, load_trained, trained_state
from tests.support import tiny

STEPS = 6


def data():
    batch = tiny.texts(STEPS * 4)[0]
    return [{name: tensor[n] for name, tensor in batch.items()} for n in range(STEPS * 4)]


def attached(**options):
    model = tiny.bert()
    selection = gradsel.select(model, tiny.texts(), gradsel.contrastive(), **options)
    gradsel.attach(model, selection)
    return model


def arguments(folder, **changes):
    settings = {
        "max_steps": STEPS, "per_device_train_batch_size": 4, "save_steps": 2, "learning_rate": 1e-2, "use_cpu": True,
        "report_to": "none", "disable_tqdm": True, "weight_decay": 0.1, **changes,
    }  # fmt: skip
    return transformers.TrainingArguments(output_dir=str(folder), **settings)


@pytest.mark.supports("CPU", "save/load")
def test_checkpoints_hold_what_is_trained_and_resume_bit_for_bit(tmp_path):
    first = attached()
    trainer = Trainer(first, arguments(tmp_path / "first"), train_dataset=data())
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, gradsel.MaskedAdamW)
    checkpoint = tmp_path / "first" / "checkpoint-2"
    stored = load_file(checkpoint / "trained.safetensors")
    trained = sum(p.numel() for p in first.parameters() if p.requires_grad)
    assert sum(tensor.numel() for tensor in stored.values()) == trained
    assert not (checkpoint / "model.safetensors").exists()

    model = tiny.bert()
    gradsel.attach(model, gradsel.Selection.load(checkpoint / "selection.safetensors"))
    second = Trainer(model, arguments(tmp_path / "second"), train_dataset=data())
    second.train(resume_from_checkpoint=str(checkpoint))
    gradsel.detach(first), gradsel.detach(model)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    model = attached()
    settings = {
        "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "learning_rate": 0.3,
        "metric_for_best_model": "loss", "per_device_eval_batch_size": 8,
    }  # fmt: skip
    trainer = Trainer(model, arguments(tmp_path, **settings), train_dataset=data(), eval_dataset=data()[:8])
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = min(losses, key=losses.get)
    assert trainer.state.best_global_step == best
    assert trainer.evaluate()["eval_loss"] == losses[best]
    for name, tensor in load_file(tmp_path / f"checkpoint-{best}" / "trained.safetensors").items():
        assert torch.equal(trained_state(model)[name], tensor), name


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2},
        {"bf16": True},
        {"max_grad_norm": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 2},
    ],
    ids=["accumulation", "bf16", "clipping and schedule"],
)
def test_it_resumes_bit_for_bit_with_other_arguments(changes, tmp_path):
    changes = {"save_steps": 1, "max_steps": 4, **changes}
    first, second = attached(), attached()
    Trainer(first, arguments(tmp_path / "first", **changes), train_dataset=data()).train()
    trainer = Trainer(second, arguments(tmp_path / "second", **changes), train_dataset=data())
    trainer.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-3"))
    for name, tensor in trained_state(first).items():
        assert torch.equal(tensor, trained_state(second)[name]), name


def test_early_stopping_keeps_the_best(tmp_path):
    model = attached()
    settings = {
        "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True, "max_steps": 30,
        "metric_for_best_model": "loss", "learning_rate": 0.5, "save_total_limit": 2,
    }  # fmt: skip
    trainer = Trainer(
        model, arguments(tmp_path, **settings), train_dataset=data(), eval_dataset=data()[:8],
        callbacks=[transformers.EarlyStoppingCallback(2)],
    )  # fmt: skip
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = min(losses, key=losses.get)
    assert trainer.state.global_step == best + 2 < 30
    assert trainer.evaluate()["eval_loss"] == losses[best]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({f"checkpoint-{best}", f"checkpoint-{best + 2}"})


def test_what_does_not_belong_to_the_model_is_refused_and_nothing_changes(tmp_path):
    Trainer(attached(), arguments(tmp_path, max_steps=2), train_dataset=data()).train()
    other = attached(policy=gradsel.PerNeuron(1), criterion=gradsel.random_scores(0))
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(ValueError, match="trained with another selection"):
        load_trained(other, tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="trains other parameters"):
        load_trained(tiny.bert(), tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match=r"\d+ is \[.*\] in|is \[.*\] in .*, \[.*\] in the model"):
        load_trained(attached(policy=gradsel.PerNeuron(2)), tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="is not a checkpoint of gradsel's Trainer"):
        load_trained(other, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_a_checkpoint_without_its_state_is_not_complete(tmp_path):
    assert last_checkpoint(tmp_path / "none") is None
    for step in (2, 10, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step != 12:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert last_checkpoint(tmp_path).name == "checkpoint-10"


def test_the_model_is_saved_plainly_also_if_transformers_does_not_know_it(tmp_path):
    model = tiny.vit()
    gradsel.attach(model, gradsel.select(model, None, None, criterion="random"))
    Trainer(model, arguments(tmp_path / "run")).save_model(tmp_path / "out")
    delta = gradsel.Delta.from_pretrained(tmp_path / "out")
    assert delta == gradsel.Delta.of(model)
    plain = gradsel.detach(model).state_dict()
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored.keys() == plain.keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in plain.items())
