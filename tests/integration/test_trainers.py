"""Real training loops of other libraries (transformers' Trainer, accelerate, Lightning), each stopped and resumed."""

from __future__ import annotations

import copy

import lightning
import pytest
import torch
import transformers
from accelerate import Accelerator
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

import gradsel
from tests.support.toy import Toy, cross_entropy

STEPS, STOP, BATCH = 6, 3, 8


class Numbers(Dataset):
    """Random token sequences of two classes."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(1, 50, (STEPS * BATCH, 7), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index, 0] % 2}


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=2,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def chosen(model: nn.Module) -> gradsel.Selection:
    data = Numbers()
    return gradsel.select(model, [data[slice(0, 16)]], lambda model, batch: model(**batch).loss)


def optimizer_for(model: nn.Module, selection: gradsel.Selection, route: str) -> gradsel.MaskedAdamW:
    """A model attached or with dense gradients, or an optimizer that selects: all that changes in a training script."""
    if route == "attached":
        gradsel.attach(model, selection)
        return gradsel.MaskedAdamW(gradsel.trainable_parameters(model), lr=1e-2, weight_decay=0.1)
    if route == "policy":
        policy, rules = gradsel.PerNeuron(1), {"freeze": ["unused.*"]} if hasattr(model, "unused") else None
        return gradsel.MaskedAdamW(model.named_parameters(), lr=1e-2, weight_decay=0.1, policy=policy, rules=rules)
    gradsel.freeze(model, selection)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return gradsel.MaskedAdamW(trained, lr=1e-2, weight_decay=0.1, masks=selection)


def check_trained(model: nn.Module, before: dict[str, Tensor], selection: gradsel.Selection) -> None:
    """Some entries of every mask have moved, and nothing else."""
    for name, parameter in model.named_parameters():
        if name not in selection:
            continue  # the values of an attached weight
        mask = selection[name].to_dense()
        assert torch.equal(parameter[~mask], before[name][~mask]), name
        assert not mask.any() or not torch.equal(parameter[mask], before[name][mask]), name


def check_same(model: nn.Module, other: nn.Module) -> None:
    theirs = other.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.fixture(params=["attached", "masks", "policy"])
def route(request):
    return request.param


def test_transformers_trainer(route, tmp_path):
    def run(folder, **arguments):
        model = bert()
        selection = chosen(model)
        before = copy.deepcopy(model.state_dict())
        optimizer = optimizer_for(model, selection, route)
        settings = transformers.TrainingArguments(
            output_dir=str(tmp_path / folder), max_steps=STEPS, per_device_train_batch_size=BATCH, max_grad_norm=0.5,
            save_steps=STOP, logging_steps=1, lr_scheduler_type="linear", warmup_steps=2, report_to=[], use_cpu=True,
            disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(model, settings, train_dataset=Numbers(), optimizers=(optimizer, None))
        trainer.train(**arguments)
        assert trainer.state.global_step == STEPS
        return model, before, optimizer.selection or selection

    model, before, selection = run("first")
    resumed, *_ = run("second", resume_from_checkpoint=str(tmp_path / "first" / f"checkpoint-{STOP}"))
    check_same(model, resumed)
    check_trained(model, before, selection)


def test_accelerate(route, tmp_path):
    def run(stop, resume):
        model = Toy().eval()
        batches = [
            (torch.randn(BATCH, 3, 8, 8, generator=torch.Generator().manual_seed(i)), torch.arange(BATCH) % 4)
            for i in range(2 * STEPS)
        ]
        selection = gradsel.select(model, batches[:2], cross_entropy, freeze=["unused.*"])
        before = copy.deepcopy(model.state_dict())
        optimizer = optimizer_for(model, selection, route)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
        if resume:
            accelerator.load_state(str(tmp_path / "state"))
        for batch in batches[2 * STOP * resume : 2 * (STOP if stop else STEPS)]:
            with accelerator.accumulate(model):
                accelerator.backward(cross_entropy(model, batch))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        if stop:
            accelerator.save_state(str(tmp_path / "state"))
        return accelerator.unwrap_model(model), before, optimizer.optimizer.selection or selection

    torch.manual_seed(0)
    model, before, selection = run(stop=False, resume=False)
    torch.manual_seed(0)
    run(stop=True, resume=False)
    torch.manual_seed(0)
    resumed, *_ = run(stop=False, resume=True)
    check_same(model, resumed)
    check_trained(model, before, selection)


class Lit(lightning.LightningModule):
    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().__init__()
        self.model, self.chosen = model, optimizer

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> dict:
        scheduler = torch.optim.lr_scheduler.LinearLR(self.chosen, 0.1, total_iters=4)
        return {"optimizer": self.chosen, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def test_lightning(route, tmp_path):
    def run(checkpoint=None):
        model = bert()
        selection = chosen(model)
        before = copy.deepcopy(model.state_dict())
        optimizer = optimizer_for(model, selection, route)
        module = Lit(model, optimizer)
        trainer = lightning.Trainer(
            max_steps=STEPS, accelerator="cpu", devices=1, gradient_clip_val=0.5, logger=False,
            enable_progress_bar=False, enable_model_summary=False,
            callbacks=[ModelCheckpoint(tmp_path, "{step}", every_n_epochs=1, save_top_k=-1)],
        )  # fmt: skip
        epoch = Subset(Numbers(), range(BATCH))  # one batch: Lightning repeats the last one when it resumes
        trainer.fit(module, DataLoader(epoch, BATCH), ckpt_path=checkpoint, weights_only=False)
        assert trainer.global_step == STEPS
        return model, before, optimizer.selection or selection

    model, before, selection = run()
    resumed, *_ = run(str(tmp_path / f"step={STOP}.ckpt"))
    check_same(model, resumed)
    check_trained(model, before, selection)
