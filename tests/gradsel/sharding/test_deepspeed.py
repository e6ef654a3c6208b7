"""DeepSpeed on CPUs: attached models train under ZeRO 0, 1 and 2 as in one process, and ZeRO-3 is refused.

DeepSpeed wants float32, or bfloat16 and float16 by its own settings.
"""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import gradsel
from gradsel.integrations.transformers import SparseCheckpoints
from tests.support import tiny
from tests.support.selections import check_consistent, random_selection
from tests.support.sharded import (
    OPTIMIZERS,
    SIZE,
    Optimizer,
    batches,
    check_alike,
    check_equal,
    common_folder,
    meshes,
    models,
    share,
)
from tests.support.toy import Toy, cross_entropy

pytestmark = [
    pytest.mark.xdist_group("ranks"),
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None,
        reason="no DeepSpeed: DS_BUILD_OPS=0 DS_ACCELERATOR=cpu pip install --no-build-isolation deepspeed installs it",
    ),
]
OWN = {"type": "AdamW", "params": {"lr": 1e-2, "eps": 1e-3, "weight_decay": 1e-2, "torch_adam": True}}
ENVIRONMENT = {"WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "DS_ACCELERATOR": "cpu"}


def engine_of(model: nn.Module, stage: int, optimizer: Any = None, zero: dict | None = None, **settings: Any) -> Any:
    """A DeepSpeedEngine; without an optimizer, with DeepSpeed's own of the trainable parameters."""
    os.environ |= ENVIRONMENT | {"RANK": str(dist.get_rank()), "LOCAL_RANK": str(dist.get_rank())}
    import deepspeed

    gc.freeze()  # DeepSpeed collects garbage time and again
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, and wait busily
    config = {
        "train_batch_size": SIZE,
        "gradient_clipping": 0.0,  # by default it is 1
        "zero_optimization": {"stage": stage, **(zero or {})},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **settings,
    }
    if optimizer is None:
        config["optimizer"] = OWN
    parameters = None if optimizer is not None else gradsel.trainable_parameters(model)
    return deepspeed.initialize(model=model, optimizer=optimizer, model_parameters=parameters, config=config)[0]


def train(engine: Any, given: list[tuple[Tensor, Tensor]], pieces: int = 1) -> None:
    """Steps on this rank's share of each batch, in pieces whose gradients are accumulated."""
    for batch in given:
        images, labels = share(batch, meshes()["four"])
        for piece in zip(images.chunk(pieces), labels.chunk(pieces), strict=True):
            engine.backward(cross_entropy(engine, piece))
            engine.step()


def train_alone(
    model: nn.Module, make: Optimizer, given: list[tuple[Tensor, Tensor]], clip: float = 0.0, **options: Any
) -> None:
    optimizer = make(gradsel.trainable_parameters(model))
    for batch in given:
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()


def compare(model: nn.Module, alone: nn.Module, tolerance: float = 1e-6) -> None:
    """Models, ranks and deltas are alike, and weights hold their values."""
    with torch.no_grad():
        model(batches(next(model.parameters()).dtype)[0][0])
    check_consistent(model)
    check_alike(model.state_dict())
    check_equal(model.state_dict(), alone.state_dict(), tolerance)
    values, expected = gradsel.Delta.of(model), gradsel.Delta.of(alone)
    for name, part in expected.items():
        torch.testing.assert_close(values[name].values, part.values, rtol=0, atol=tolerance)


def as_in_one_process(stage: int, optimizer: str, kind: str = "per-row", clip: float = 0.0, **settings: Any) -> None:
    given = batches(torch.float32)
    model, alone, selection = models(kind, torch.float32)
    gradsel.attach(model, selection)
    gradsel.attach(alone, selection)
    own = None if optimizer == "DeepSpeed's" else OPTIMIZERS[optimizer](gradsel.trainable_parameters(model))
    compiled = settings.pop("compiled", False)
    engine = engine_of(model, stage, own, gradient_clipping=clip, **settings)
    if compiled:
        torch.compiler.reset()
        engine.compile(backend="aot_eager")
    train(engine, given, settings.get("gradient_accumulation_steps", 1))
    train_alone(alone, OPTIMIZERS["AdamW" if own is None else optimizer], given, clip)
    compare(model, alone)
    engine.destroy()


@pytest.mark.supports("DeepSpeed", "attach", "MaskedAdam", "other optimizers", "delta")
@pytest.mark.parametrize(
    ("stage", "optimizer"),
    [(0, "MaskedAdamW"), (1, "MaskedAdamW"), (2, "MaskedAdamW"), (2, "AdamW"), (1, "SGD"), (2, "DeepSpeed's")],
)
def test_stages(ranks, stage, optimizer):
    ranks.run(as_in_one_process, stage, optimizer)


OPTIONS: dict[str, dict[str, Any]] = {
    "irregular": {"kind": "irregular"},
    "whole": {"kind": "whole"},
    "clipping": {"clip": 0.05},
    "accumulation": {"gradient_accumulation_steps": 3},
    "offload": {"zero": {"offload_optimizer": {"device": "cpu"}}},
    "round robin": {"zero": {"round_robin_gradients": True}},
    "compiled": {"compiled": True},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options(ranks, option):
    ranks.run(with_options, OPTIONS[option])


def with_options(options: dict[str, Any]) -> None:
    as_in_one_process(2, "MaskedAdamW", **dict(options))


def in_bfloat16(stage: int, accumulated: str | None) -> None:
    """Values are float32 in a bfloat16 model, so they are a group of their own: DeepSpeed joins each group in one."""
    models_, selections = [], []
    for _ in range(2):
        torch.manual_seed(0)
        model = Toy().eval()
        model.bn = nn.Identity()  # type: ignore[assignment]  # its statistics would stay in float32
        selections.append(random_selection(model, freeze=["unused.*"]))
        gradsel.attach(model, selections[-1])
        models_.append(model)
    model, alone = models_
    alone.bfloat16()
    trained = [(name.endswith("_values"), p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [p for is_values, p in trained if is_values is kind]} for kind in (True, False)]
    settings = {"data_types": {"grad_accum_dtype": accumulated}} if accumulated else {}
    engine = engine_of(model, stage, OPTIMIZERS["MaskedAdamW"](groups), bf16={"enabled": True}, **settings)
    given = batches(torch.bfloat16)
    train(engine, given)
    train_alone(alone, OPTIMIZERS["MaskedAdamW"], given)
    assert {p.dtype for name, p in model.named_parameters() if name.endswith("_values")} == {torch.float32}
    compare(model, alone, 2**-8)  # to how much bfloat16 rounds between 1/2 and 1
    engine.destroy()


@pytest.mark.parametrize(("stage", "accumulated"), [(1, None), (1, "fp32"), (2, None)])
def test_bfloat16(ranks, stage, accumulated):
    ranks.run(in_bfloat16, stage, accumulated)


def resumed(stage: int, without_frozen: bool) -> None:
    def made() -> tuple[nn.Module, Any]:
        model, _, selection = models(dtype=torch.float32)
        gradsel.attach(model, selection)
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        return model, engine_of(model, stage, gradsel.MaskedAdamW(named, lr=1e-2, eps=1e-3, anchor=0.01))

    folder, given = str(common_folder()), batches(torch.float32)
    model, engine = made()
    train(engine, given[:2])
    engine.save_checkpoint(folder, tag="saved", exclude_frozen_parameters=without_frozen)
    train(engine, given[2:])
    other, again = made()
    again.load_checkpoint(folder, tag="saved", load_module_strict=not without_frozen)
    train(again, given[2:])
    check_equal(other.state_dict(), model.state_dict(), 0)
    compare(other, model, 0)
    engine.destroy()
    again.destroy()


@pytest.mark.supports("DeepSpeed", "save/load")
@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("without_frozen", [False, True], ids=["all", "trained only"])
def test_checkpoints(ranks, stage, without_frozen):
    ranks.run(resumed, stage, without_frozen)


def detached() -> None:
    model, alone, selection = models(dtype=torch.float32)
    gradsel.attach(model, selection)
    gradsel.attach(alone, selection)
    engine = engine_of(model, 2, OPTIMIZERS["MaskedAdamW"](gradsel.trainable_parameters(model)))
    train(engine, batches(torch.float32))
    train_alone(alone, OPTIMIZERS["MaskedAdamW"], batches(torch.float32))
    gradsel.detach(engine)
    gradsel.detach(alone)
    check_equal(model.state_dict(), alone.state_dict(), 1e-6)
    engine.destroy()


@pytest.mark.supports("DeepSpeed", "merge")
def test_detached(ranks):
    ranks.run(detached)


@contextmanager
def own_linear() -> Iterator[None]:
    """Puts back the function that ZeRO-3 replaces for the rest of the process."""
    linear = nn.functional.linear
    try:
        yield
    finally:
        nn.functional.linear = linear


@own_linear()
def all_of_it() -> None:
    """Everything whole: attach() has only said what is frozen, so that ZeRO-3 may have it."""
    import deepspeed

    model, alone, selection = models("whole", torch.float32)
    gradsel.attach(model, selection)
    gradsel.attach(alone, selection)
    engine = engine_of(model, 3, OPTIMIZERS["MaskedAdamW"](gradsel.trainable_parameters(model)))
    train(engine, batches(torch.float32))
    train_alone(alone, OPTIMIZERS["MaskedAdamW"], batches(torch.float32))
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        check_equal(dict(model.named_parameters()), dict(alone.named_parameters()), 1e-6)
    engine.destroy()


def test_masks_of_an_optimizer(ranks):
    ranks.run(masked)


def masked() -> None:
    """In stage 0 with float32 the optimizer has the parameters themselves."""
    for policy in (False, True):
        for stage in (0, 2):
            model, alone, selection = models(dtype=torch.float32)
            rules = {"freeze": ["unused.*"]}
            chosen = {"policy": gradsel.PerNeuron(1), "rules": rules} if policy else {"masks": selection}
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            engine = engine_of(model, stage, gradsel.MaskedAdamW(model.named_parameters(), lr=1e-2, eps=1e-3, **chosen))
            if stage:
                with pytest.raises(KeyError, match=r"by hand.*DeepSpeed.*attach\(\) the model first"):
                    train(engine, batches(torch.float32))
                check_equal(dict(model.named_parameters()), before, 0)
            else:
                train(engine, batches(torch.float32))
                own = gradsel.MaskedAdamW(alone.named_parameters(), lr=1e-2, eps=1e-3, **chosen)
                for batch in batches(torch.float32):
                    own.zero_grad()
                    cross_entropy(alone, batch).backward()
                    own.step()
                check_equal(dict(model.named_parameters()), dict(alone.named_parameters()), 1e-6)
            engine.destroy()


@own_linear()
def refused() -> None:
    plain, attached, selection = models(dtype=torch.float32)
    gradsel.attach(attached, selection)
    with pytest.raises(RuntimeError, match=r"patch_embed.weight is attached.*ZeRO-3.*stage 0, 1 or 2"):
        engine_of(attached, 3, torch.optim.SGD(gradsel.trainable_parameters(attached), 0.1))
    engine = engine_of(plain, 3, torch.optim.SGD(plain.parameters(), 0.1))
    with pytest.raises(ValueError, match=r"cls_token is partitioned by DeepSpeed's ZeRO-3.*attach\(\)"):
        gradsel.attach(plain, selection)
    with pytest.raises(ValueError, match=r"cls_token is partitioned by DeepSpeed's ZeRO-3.*select\(\)"):
        gradsel.select(plain, batches(torch.float32), cross_entropy, process_group=dist.group.WORLD)
    engine.destroy()
    again = models(dtype=torch.float32)[0]
    gradsel.attach(again, selection)
    with pytest.raises(RuntimeError, match=r"replaced torch.nn.functional.linear.*start a new process"):
        again(batches(torch.float32)[0][0])
    for stage in (0, 2):
        late, _, selection = models(dtype=torch.float32)
        engine = engine_of(late, stage, torch.optim.SGD(late.parameters(), 0.1))
        for model in (engine, late) if stage else (engine,):
            with pytest.raises(ValueError, match=r"DeepSpeed engine.*attach\(\) the model first"):
                gradsel.attach(model, selection)
        if stage:
            with pytest.raises(ValueError, match=r"patch_embed.weight has a hook.*before deepspeed.initialize\(\)"):
                gradsel.select(engine, batches(torch.float32), cross_entropy, process_group=dist.group.WORLD)
        engine.destroy()


def test_refused(ranks):
    ranks.run(refused)


def test_zero_3_of_what_is_trained_whole(ranks):
    ranks.run(all_of_it)


def fine_tuned(folder: str) -> None:
    """transformers' Trainer, stopped after two steps and resumed."""
    import transformers
    from accelerate.state import AcceleratorState

    from gradsel.integrations.transformers import masked_adamw

    os.environ |= ENVIRONMENT | {"RANK": str(dist.get_rank()), "LOCAL_RANK": str(dist.get_rank())}
    AcceleratorState._reset_state(True)
    batch = tiny.texts()[0]
    samples = [{name: tensor[number] for name, tensor in batch.items()} for number in range(8)]
    settings = {
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        **dict.fromkeys(("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_clipping"), "auto"),
    }

    def made() -> nn.Module:
        torch.manual_seed(0)
        config = tiny.bert_config(num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        model = transformers.BertForSequenceClassification(config)
        gradsel.attach(model, gradsel.select(model, None, None, gradsel.PerNeuron(2), "magnitude"))
        return model

    for steps, resumed_from in ((2, None), (3, f"{folder}/checkpoint-2")):
        arguments = transformers.TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-2, adam_epsilon=1e-3,
            lr_scheduler_type="constant", max_grad_norm=0.5, use_cpu=True, save_steps=1, disable_tqdm=True,
            report_to="none", average_tokens_across_devices=False, deepspeed=settings,
        )  # fmt: skip
        trainer = transformers.Trainer(
            made(), arguments, train_dataset=samples, optimizer_cls_and_kwargs=masked_adamw(arguments)
        )
        with pytest.raises(ValueError, match="the Trainer shards the model"):
            trainer.add_callback(SparseCheckpoints(trainer))
        trainer.train(resume_from_checkpoint=resumed_from)
    assert type(trainer.model_wrapped).__name__ == "DeepSpeedEngine"
    alone = made()
    optimizer = gradsel.MaskedAdamW(gradsel.trainable_parameters(alone), lr=1e-2, eps=1e-3, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        alone(**batch).loss.backward()
        optimizer.clip_grad_norm_(0.5)
        optimizer.step()
    expected = gradsel.Delta.of(alone)
    delta = gradsel.Delta.of(trainer.model)
    for name, part in expected.items():
        torch.testing.assert_close(delta[name].values, part.values, rtol=0, atol=1e-6)


def test_trainer(ranks, tmp_path):
    ranks.run(fine_tuned, str(tmp_path))


def prepared() -> None:
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.state import AcceleratorState

    rank = str(dist.get_rank())
    os.environ |= ENVIRONMENT | {"RANK": rank, "LOCAL_RANK": rank, "ACCELERATE_USE_DEEPSPEED": "true"}
    AcceleratorState._reset_state(True)
    settings = {
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": SIZE // 4,
        "gradient_clipping": 0.05,
    }
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings))
    model, alone, selection = models(dtype=torch.float32)
    gradsel.attach(model, selection)
    gradsel.attach(alone, selection)
    own = OPTIMIZERS["MaskedAdamW"](gradsel.trainable_parameters(model))
    engine, optimizer = accelerator.prepare(model, own)
    assert type(engine).__name__ == "DeepSpeedEngine"
    for batch in batches(torch.float32):
        accelerator.backward(cross_entropy(engine, share(batch, meshes()["four"])))
        optimizer.step()
    train_alone(alone, OPTIMIZERS["MaskedAdamW"], batches(torch.float32), 0.05)
    compare(model, alone)
    del os.environ["ACCELERATE_USE_DEEPSPEED"]


def test_accelerate(ranks):
    ranks.run(prepared)
