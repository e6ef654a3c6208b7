"""The code in the documentation, and what each page takes for granted."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import gradsel
from tests.support import tiny

ROOT = Path(__file__).parents[2]
#: Pages whose Python is that of examples/, which tests/examples runs.
EXAMPLES = "docs/howto/"
#: Pages with a test of their own, which also checks what their code has made.
WITH_A_TEST = {"docs/quantised.md", "docs/transformers.md"}
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)

Names = dict[str, Any]


class Block(NamedTuple):
    """A block of code: the line of its first line in the page, its language, and its text."""

    line: int
    language: str
    code: str


def pages() -> list[str]:
    found = [path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]]
    return sorted(page for page in found if page != "CHANGELOG.md")


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text()
    return [Block(text.count("\n", 0, found.start()) + 2, found[1], found[2]) for found in _BLOCK.finditer(text)]


# --- What pages take for granted ---------------------------------------------------------------------------------


def a_model() -> Names:
    """A model of transformers with its data, as in a training script that exists already."""
    model = tiny.bert()
    batches = tiny.texts()
    selection = gradsel.select(model, batches, gradsel.cross_entropy, gradsel.PerNeuron(1))
    return {
        "gradsel": gradsel,
        "torch": torch,
        "model": model,
        "base": copy.deepcopy(model),
        "batches": batches,
        "loader": batches,
        "loss": gradsel.cross_entropy,
        "selection": selection,
    }


def attached_model() -> Names:
    names = a_model()
    gradsel.attach(names["model"], names["selection"])
    return names


def for_deltas() -> Names:
    """A trained model, and the file of another task in the working folder."""
    names = attached_model()
    names["model"].classifier.weight.data.add_(1)
    names["model"].bert.pooler.dense.weight_values.data.mul_(2)
    gradsel.sync(names["model"])
    gradsel.save_delta(names["model"], "cars.delta", selection=names["selection"])
    return names


def for_loras() -> Names:
    """As :func:`for_deltas`, of whole columns and without biases, which LoRA has no place for."""
    names = a_model()
    model = names["model"]
    names["selection"] = gradsel.select(
        model, names["batches"], gradsel.cross_entropy, gradsel.Columns(2), kinds={"bias": "freeze", "head": "freeze"}
    )
    gradsel.attach(model, names["selection"])
    model.bert.pooler.dense.weight_values.data.mul_(2)
    gradsel.sync(model)
    import peft

    return {**names, "peft": peft}


def for_peft() -> Names:
    from peft import LoraConfig, SupertuningConfig, get_peft_model

    given = {"LoraConfig": LoraConfig, "SupertuningConfig": SupertuningConfig, "get_peft_model": get_peft_model}
    return {**a_model(), **given}


def for_trainers() -> Names:
    import accelerate
    import transformers

    names = a_model()
    data = [{name: tensor[i] for name, tensor in batch.items()} for batch in names["batches"] for i in range(4)]
    arguments = transformers.TrainingArguments("runs", max_steps=2, report_to="none", use_cpu=True, save_steps=1)
    return {
        **names,
        "transformers": transformers,
        "args": arguments,
        "arguments": arguments,
        "data": data,
        "accelerator": accelerate.Accelerator(cpu=True),
    }


#: By page, what its blocks find, if not :func:`a_model`. Blocks share it, in their order.
GIVEN: dict[str, Callable[[], Names]] = {
    "docs/deltas.md": for_deltas,
    "docs/finetune.md": for_trainers,
    "docs/optimizer.md": for_trainers,
}
#: Blocks that find another state than those before them have left, by page and a line of theirs.
ANEW: dict[tuple[str, str], Callable[[], Names]] = {
    ("docs/serving.md", "delta = gradsel.save_delta(model"): for_loras,
    ("docs/serving.md", "update = gradsel.patches(model) "): attached_model,
    ("docs/serving.md", "peft_model = gradsel.peft.accelerate("): for_peft,
    ("docs/serving.md", "peft_model = get_peft_model(model, LoraConfig(r=8))"): for_peft,
    ("docs/optimizer.md", "optimizer = gradsel.MaskedAdamW(model.named_parameters(), lr=1e-3, policy="): for_trainers,
}
#: Blocks that cannot run here, by page and a line of theirs, and why.
NOT_RUN: dict[tuple[str, str], str] = {
    ("docs/distributed.md", "fully_shard(model)"): "needs several processes; tests/gradsel/sharding does the same",
    ("docs/distributed.md", "parallelize_module("): "needs several processes; tests/gradsel/sharding does the same",
    ("docs/distributed.md", "PipelineStage("): "needs several processes; tests/gradsel/sharding does the same",
    ("docs/distributed.md", "deepspeed.initialize("): "needs DeepSpeed; tests/gradsel/sharding does the same",
    ("docs/finetune.md", 'name": "timm/vit_base_patch16_224.augreg_in21k"'): "downloads the weights of a model",
    (
        "docs/serving.md",
        "trainer = AsyncGRPOTrainer(",
    ): "needs a server of vLLM",
}


def found_for(table: dict[tuple[str, str], Any], page: str, block: Block) -> Any:
    """What a table says about a block, or None."""
    return next((value for (where, line), value in table.items() if where == page and line in block.code), None)
