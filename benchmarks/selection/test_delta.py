"""Tasks of ViT-B/16 saved, applied and switched, against full checkpoints and LoRA.

The tasks are GPS with K = 1 and a head of 100 classes. Sizes are compared file with file.
"""

from __future__ import annotations

import copy
import warnings
from itertools import cycle

import pytest
import torch
from safetensors.torch import load_file

import gradsel
from gradsel.delta.bank import TaskBank
from gradsel.delta.delta import Delta, save_delta
from gradsel.delta.exporting import export
from gradsel.papers.vit import vit_base_patch16_224
from gradsel.parameters.fingerprints import fingerprints

peft = pytest.importorskip("peft")

SIZE, CLASSES, TASKS = "ViT-B/16, 100 classes", 100, ("first", "second")


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return vit_base_patch16_224(num_classes=CLASSES).eval()


@pytest.fixture(scope="module")
def tuned(base):
    """An attached model that has learned a task, and its selection, with the fingerprints that select() adds to it."""
    return with_task(base, seed=0)


def with_task(base, seed):
    chosen = gradsel.select(base, None, None, gradsel.PerNeuron(1), gradsel.random_scores(seed), progress=False)
    selection = gradsel.Selection(chosen, chosen.notes, fingerprints(base))
    model = copy.deepcopy(base)
    gradsel.attach(model, selection)
    with torch.no_grad():
        for parameter in gradsel.trainable_parameters(model):
            parameter.add_(torch.randn_like(parameter), alpha=1e-2)
    gradsel.sync(model)
    return model, selection


@pytest.fixture(scope="module")
def folder(base, tuned, tmp_path_factory):
    """Two tasks, each with entries of its own, as deltas, full checkpoints and LoRA adapters."""
    folder = tmp_path_factory.mktemp("tasks")
    for task, (model, selection) in zip(TASKS, (tuned, with_task(base, seed=1)), strict=True):
        save_delta(model, folder / f"{task}.delta", selection=selection)
        export(model, folder / f"{task}.safetensors")
        adapted = lora(copy.deepcopy(base))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=1e-2)
        adapted.save_pretrained(folder / task)
    return folder


def lora(model):
    config = peft.LoraConfig(
        r=8, target_modules=["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"], modules_to_save=["head"]
    )
    return peft.get_peft_model(model, config)


def size(*paths) -> int:
    return sum(path.stat().st_size for path in paths)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saving(contest, tuned, folder, dtype):
    model, selection = tuned
    full, small, alone = folder / "out.safetensors", folder / "out.delta", folder / "alone.delta"
    export(model, full)
    save_delta(model, small, selection=selection, dtype=dtype)
    providers = {
        "full checkpoint": (lambda: export(model, full), size(full)),
        "delta, fingerprints computed": (lambda: save_delta(model, alone, dtype=dtype), size(small)),
        "delta": (lambda: save_delta(model, small, selection=selection, dtype=dtype), size(small)),
    }
    contest("save a task", SIZE, str(dtype).removeprefix("torch."), {1: providers})


def test_a_task_from_its_file(contest, base, folder):
    """From a file to a model that computes the task, and back again where that is possible."""
    model, other, merged = (copy.deepcopy(base) for _ in range(3))

    def delta() -> None:
        Delta.load(folder / "first.delta").apply_(model).revert_()

    def checkpoint() -> None:
        other.load_state_dict(load_file(folder / "first.safetensors"))
        other.load_state_dict(load_file(folder / "second.safetensors"))

    def adapter() -> None:
        nonlocal merged
        adapted = peft.PeftModel.from_pretrained(merged, folder / "first")
        adapted.merge_adapter()
        adapted.unmerge_adapter()
        merged = adapted.unload()

    lora_file = folder / "first" / "adapter_model.safetensors"
    providers = {
        "full checkpoint": (checkpoint, 2 * size(folder / "first.safetensors")),
        "LoRA r=8, merged": (adapter, size(lora_file)),
        "delta": (delta, size(folder / "first.delta")),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        contest("load a task and take it back", SIZE, "float32", {1: providers})


def test_a_loaded_task(contest, base, folder):
    """Applied and reverted; the base is checked each time."""
    model, delta = copy.deepcopy(base), Delta.load(folder / "first.delta")
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    written = 2 * delta.nbytes
    providers = {
        "load_state_dict": (lambda: model.load_state_dict(state), sum(tensor.nbytes for tensor in state.values())),
        "delta": (lambda: delta.apply_(model).revert_(), written),
    }
    contest("apply and revert a task", SIZE, "float32", {1: providers})


def test_switching(contest, base, folder):
    model, merged = copy.deepcopy(base), copy.deepcopy(base)
    bank = TaskBank(model)
    for task in TASKS:
        bank.add(task, folder / f"{task}.delta")
    adapted = peft.PeftModel.from_pretrained(merged, folder / TASKS[0], adapter_name=TASKS[0])
    adapted.load_adapter(folder / TASKS[1], adapter_name=TASKS[1])
    adapted.merge_adapter([TASKS[0]])
    states = {task: load_file(folder / f"{task}.safetensors") for task in TASKS}
    other = copy.deepcopy(base)
    turns = {name: cycle(TASKS[::-1]) for name in ("full", "lora", "bank")}

    def lora_switch() -> None:
        adapted.unmerge_adapter()
        adapted.merge_adapter([next(turns["lora"])])

    whole = sum(tensor.nbytes for tensor in states[TASKS[0]].values())
    providers = {
        "load_state_dict": (lambda: other.load_state_dict(states[next(turns["full"])]), whole),
        "LoRA r=8, unmerged and merged": (lora_switch, 2 * whole),
        "task bank": (lambda: bank.activate(next(turns["bank"])), 2 * bank[TASKS[0]].nbytes),
    }
    contest("switch between two tasks", SIZE, "float32", {1: providers})
    bank.activate(None)
    assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in model.state_dict().items())
