"""Checkpoints of any Trainer hold what is trained, and a run that was killed ends as one that was not."""

from __future__ import annotations

import copy
import os
import signal

import pytest
import torch
import transformers
from safetensors.torch import load_file

import gradsel
from gradsel.integrations.transformers import SparseCheckpoints, StopCleanly, masked_adamw
from tests.support import pretrained, tiny

peft = pytest.importorskip("peft")

STEPS, BATCH = 6, 4


def data():
    batch = tiny.texts(STEPS * BATCH)[0]
    return [{name: tensor[n] for name, tensor in batch.items()} for n in range(STEPS * BATCH)]


def llama_data():
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(0, 50, (STEPS * BATCH, 8), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


def llama(dtype=torch.float32):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=True, attention_dropout=0.1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype)


def next_token(model, batch):
    return model(**batch).loss


def prepared(route):
    """A model, data and options of the Trainer, as a script makes them each time it is started."""
    if route in ("masks", "policy", "attached", "LoRA"):
        model, rows = tiny.bert(), data()
        selection = gradsel.select(model, tiny.texts(), gradsel.contrastive())
    else:
        model, rows = llama(torch.bfloat16), llama_data()
        batches = [transformers.default_data_collator(rows[:8])]
        selection = gradsel.select(model, batches, next_token, gradsel.Rows(2))
    if route == "masks":
        return model, rows, {"masks": selection}
    if route == "policy":
        return model, rows, {"policy": gradsel.PerNeuron(1)}
    if route == "LoRA":
        torch.manual_seed(3)
        config = peft.LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"])
        return peft.get_peft_model(model, config), rows, {}
    gradsel.attach(model, selection)
    return model, rows, {}


ROUTES = ["attached", "attached Llama in bfloat16", "masks", "policy", "LoRA"]


class Killed(transformers.TrainerCallback):
    """Ends the process, as far as the test is concerned, in the middle of a step."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise SystemExit


class CtrlC(Killed):
    """Sends the signal that a terminal sends."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


class Own(transformers.Trainer):
    """Somebody's subclass, whose own work must still be done."""

    saved = 0

    def _save_checkpoint(self, model, trial):
        self.saved += 1
        super()._save_checkpoint(model, trial)


def run(route, folder, kill=None, resume=False, kind=Own, callbacks=(), **changes):
    model, rows, options = prepared(route)
    settings = transformers.TrainingArguments(
        **{
            "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": BATCH, "save_steps": 2,
            "learning_rate": 1e-2, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 3,
            "warmup_steps": 2, "weight_decay": 0.1, **changes,
        }
    )  # fmt: skip
    trainer = kind(
        model, settings, train_dataset=rows, callbacks=[Killed(kill), *callbacks],
        optimizer_cls_and_kwargs=masked_adamw(settings, **options),
    )  # fmt: skip
    trainer.add_callback(SparseCheckpoints(trainer))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer):
    return [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("route", ROUTES)
def test_killed_and_resumed_is_as_if_it_had_not_been(route, tmp_path):
    whole = run(route, tmp_path / "whole")
    assert whole.saved == 3
    with pytest.raises(SystemExit):
        run(route, tmp_path / "run", kill=5)
    # What a kill in the middle of a save leaves behind is no checkpoint.
    (tmp_path / "run" / "checkpoint-5").mkdir()
    (tmp_path / "run" / "checkpoint-5" / "trained.safetensors").write_bytes(b"half")
    resumed = run(route, tmp_path / "run", resume=True)
    theirs = whole.model.state_dict()
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name
    assert losses(resumed) == losses(whole)
    last = [load_file(tmp_path / each / f"checkpoint-{STEPS}" / "trained.safetensors") for each in ("whole", "run")]
    assert all(torch.equal(tensor, last[1][name]) for name, tensor in last[0].items())


@pytest.mark.parametrize("route", ROUTES)
def test_a_checkpoint_has_what_is_trained_and_no_more(route, tmp_path):
    trainer = run(route, tmp_path, max_steps=2)
    folder = tmp_path / "checkpoint-2"
    assert not list(folder.glob("model*")) + list(folder.glob("adapter*"))
    stored = sum(tensor.numel() for tensor in load_file(folder / "trained.safetensors").values())
    optimizer = trainer.optimizer.optimizer
    if optimizer.selection is not None:
        assert stored == optimizer.selection.trainable_count()
    else:
        assert stored == sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in trainer.model.parameters())
    assert stored < total / 4


def test_ctrl_c_saves_a_checkpoint_and_stops(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    stopped = run("attached", tmp_path / "run", callbacks=[CtrlC(2), StopCleanly()])
    assert stopped.state.global_step == 3
    assert signal.getsignal(signal.SIGINT) is before
    resumed = run("attached", tmp_path / "run", resume=True)
    theirs = run("attached", tmp_path / "whole").model.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in resumed.model.state_dict().items())


def test_old_checkpoints_are_removed_and_the_best_one_is_loaded(tmp_path):
    settings = {
        "save_total_limit": 2, "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.3,
        "load_best_model_at_end": True, "metric_for_best_model": "loss", "logging_steps": 1,
    }  # fmt: skip

    class Evaluating(transformers.Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, eval_dataset=data()[:8], **kwargs)

    trainer = run("masks", tmp_path, kind=Evaluating, **settings)
    found = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = min(found, key=found.get)
    assert trainer.state.best_global_step == best
    assert trainer.evaluate()["eval_loss"] == found[best]
    kept = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert kept == {f"checkpoint-{best}", f"checkpoint-{STEPS}"} | (
        {f"checkpoint-{STEPS - 1}"} if best == STEPS else set()
    )


def test_entries_of_an_earlier_selection_are_kept(tmp_path):
    """A reselecting optimizer has moved entries that are no longer selected, so that masks do not say what changed."""
    options = {"policy": gradsel.PerNeuron(1), "reselect_every": 2}

    def trained(folder, kill=None, resume=False):
        settings = transformers.TrainingArguments(
            str(folder), max_steps=STEPS, per_device_train_batch_size=BATCH, save_steps=1, use_cpu=True,
            report_to="none", disable_tqdm=True, max_grad_norm=0.0, learning_rate=1e-2,
        )  # fmt: skip
        trainer = transformers.Trainer(
            tiny.bert(), settings, train_dataset=data(), callbacks=[Killed(kill)],
            optimizer_cls_and_kwargs=masked_adamw(settings, **options),
        )  # fmt: skip
        trainer.add_callback(SparseCheckpoints(trainer))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = trained(tmp_path / "whole")
    assert whole.optimizer.optimizer.has_reselected
    with pytest.raises(SystemExit):
        trained(tmp_path / "run", kill=4)
    with pytest.raises(SystemExit):
        trained(tmp_path / "run", kill=5, resume=True)
    resumed = trained(tmp_path / "run", resume=True)
    theirs = whole.model.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in resumed.model.state_dict().items())


def test_the_model_is_saved_for_others(tmp_path):
    """save_model() writes what everybody reads; of PEFT, the adapter."""
    trainer = run("attached", tmp_path / "run", max_steps=2)
    expected = gradsel.detach(copy.deepcopy(trainer.model)).state_dict()
    for is_pushed in (False, True):  # push_to_hub() calls it so
        folder = tmp_path / f"out {is_pushed}"
        trainer.save_model(folder, _internal_call=is_pushed)
        plain = transformers.BertForSequenceClassification.from_pretrained(folder)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in plain.state_dict().items())
        assert (folder / "gradsel.delta").is_file()
    adapted = run("LoRA", tmp_path / "lora", max_steps=2)
    adapted.save_model(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_a_trainer_of_trl(tmp_path):
    """Its own work when it saves a checkpoint is done as well, and so is a resumed run."""
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    texts = ["the film is warm and funny", "the story is cold", "a dull film", "great and fine"]
    folder = pretrained.llama(tmp_path / "base", texts)
    rows = datasets.Dataset.from_dict({"text": texts * 4})

    def trained(output, kill=None, resume=False):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        tokenizer.eos_token = tokenizer.pad_token
        batch = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)([tokenizer(text) for text in texts])
        batch.pop("token_type_ids", None)
        gradsel.attach(model, gradsel.select(model, [batch], next_token, gradsel.PerNeuron(1)))
        settings = trl.SFTConfig(
            str(output), max_steps=4, per_device_train_batch_size=4, save_steps=2, use_cpu=True, report_to="none",
            disable_tqdm=True, learning_rate=1e-2, bf16=False, gradient_checkpointing=False,
        )  # fmt: skip
        trainer = trl.SFTTrainer(
            model, settings, train_dataset=rows, processing_class=tokenizer, callbacks=[Killed(kill)],
            optimizer_cls_and_kwargs=masked_adamw(settings),
        )  # fmt: skip
        trainer.add_callback(SparseCheckpoints(trainer))
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model.state_dict()

    whole = trained(tmp_path / "whole")
    assert (tmp_path / "whole" / "README.md").is_file()  # TRL's model card
    assert not (tmp_path / "whole" / "checkpoint-4" / "model.safetensors").exists()
    with pytest.raises(SystemExit):
        trained(tmp_path / "run", kill=3)
    resumed = trained(tmp_path / "run", resume=True)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in resumed.items())


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no complete checkpoint; leave it out to begin anew"):
        run("attached", tmp_path / "empty", resume=True)
    with pytest.raises(ValueError, match="there is no folder nowhere"):
        run("attached", tmp_path / "empty", resume="nowhere")
    run("attached", tmp_path, max_steps=2)
    with pytest.raises(ValueError, match="trains other parameters"):
        run("LoRA", tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"trains other parameters|in the model"):
        run("masks", tmp_path, resume=True)
    file = tmp_path / "checkpoint-2" / "trained.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"trained\.safetensors is damaged .*remove .*checkpoint-2"):
        run("attached", tmp_path, resume=True)
    with pytest.raises(TypeError, match="make the Trainer first"):
        SparseCheckpoints(tiny.bert())


def test_the_real_model(tmp_path):
    """MiniLM, of which a checkpoint with masks is a small part."""
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(pretrained.minilm(), num_labels=3)
    rows = [{"input_ids": torch.randint(1000, 2000, (6,)), "labels": n % 3} for n in range(8)]
    batch = transformers.default_data_collator(rows)
    selection = gradsel.select(model, [batch], gradsel.contrastive())
    settings = transformers.TrainingArguments(
        str(tmp_path), max_steps=1, save_steps=1, use_cpu=True, report_to="none", disable_tqdm=True
    )
    trainer = transformers.Trainer(
        model, settings, train_dataset=rows, optimizer_cls_and_kwargs=masked_adamw(settings, masks=selection)
    )
    trainer.add_callback(SparseCheckpoints(trainer))
    trainer.train()
    stored = load_file(tmp_path / "checkpoint-1" / "trained.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == selection.trainable_count()
    size = sum(path.stat().st_size for path in (tmp_path / "checkpoint-1").iterdir())
    assert size < sum(p.nbytes for p in model.parameters()) / 20
