"""The methods of the GPU benchmarks are what their papers say.

Whoever is compared with has to be right: each method trains as many numbers as its formula says, those and no others
move, and what is merged for inference computes the same.
"""

from __future__ import annotations

import copy

import pytest
import torch

import gradsel
from gradsel.experiments.cost import contenders, vit
from gradsel.experiments.cost import methods as every
from gradsel.papers.vit import VisionTransformer

DIM, DEPTH, HIDDEN, CLASSES, TOKENS = 32, 3, 128, 10, 17
PATCH = 3 * 8 * 8  # inputs of the patch embedding
HEAD = CLASSES * (DIM + 1)
# Of every block: outputs of its linear layers, and inputs.
OUTPUTS = (3 * DIM, DIM, HIDDEN, DIM)
INPUTS = (DIM, DIM, DIM, HIDDEN)
NEURONS = DEPTH * sum(OUTPUTS) + DIM  # those of the patch embedding too
TOTAL = (
    DEPTH * (sum(o * i + o for o, i in zip(OUTPUTS, INPUTS, strict=True)) + 4 * DIM)
    + DIM * (PATCH + 1) + DIM + TOKENS * DIM + 2 * DIM + HEAD
)  # fmt: skip
ROWS = sum(3 * i for i in INPUTS) * DEPTH + 3 * PATCH
#: What each method trains; adapters have 64 hidden units, LoRA has rank 8, VPT 50 tokens.
TRAINED = {
    ("full fine-tuning", 0): TOTAL,
    ("linear probe", 0): HEAD,
    ("bias", 0): NEURONS + (2 * DEPTH + 1) * DIM + HEAD,
    ("SSF", 0): 2 * (NEURONS + (2 * DEPTH + 1) * DIM) + HEAD,
    ("VPT-Deep", 50): DEPTH * 50 * DIM + HEAD,
    ("adapter (Houlsby)", 64): 2 * DEPTH * (2 * 64 * DIM + 64 + DIM) + HEAD,
    ("adapter (Pfeiffer)", 64): DEPTH * (2 * 64 * DIM + 64 + DIM) + HEAD,
    ("LoRA", 8): DEPTH * 8 * sum(OUTPUTS + INPUTS) + HEAD,
    ("GPS as published", 1): 2 * NEURONS + HEAD,
    **{("GPS, attached", k): k * NEURONS + NEURONS + HEAD for k in (1, 2, 10)},
    ("random, attached", 1): 2 * NEURONS + HEAD,
    ("GRFT rows, attached", 3): ROWS + NEURONS + HEAD,
    ("GRFT columns, attached", 3): 3 * NEURONS + NEURONS + HEAD,
    ("floor", 0): 0,
}
LEARNING = [key for key in TRAINED if key[0] != "floor"]


@pytest.fixture(autouse=True)
def one_thread():
    """Threads of so small products mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return VisionTransformer(
        image_size=32, patch=8, dim=DIM, depth=DEPTH, heads=4, mlp_ratio=HIDDEN / DIM, num_classes=CLASSES
    )


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 3, 32, 32, generator=generator), torch.arange(8) % 4


@pytest.fixture(scope="module")
def task(base, batch):
    select = contenders.Selections(base, [batch], gradsel.contrastive("forward_features"))
    return contenders.Task(
        gradsel.cross_entropy, r"blocks\..*\.(qkv|proj|fc1|fc2)", "head", ("patch_embed.proj",), select
    )  # fmt: skip


@pytest.fixture(scope="module")
def methods(task):
    return {(method.name, method.k): method for method in every.for_vit(task, torch.float32)}


@pytest.fixture
def build(base, methods):
    def built(key, rate: float = 1e-2):
        contender = methods[key].build(copy.deepcopy(base))
        for group in contender.optimizer.param_groups if contender.optimizer else ():
            group["lr"] = rate
        return contender

    return built


def test_all_methods_are_known(methods):
    assert methods.keys() == TRAINED.keys()


@pytest.mark.parametrize("key", TRAINED, ids=str)
def test_trains_as_many_numbers_as_its_paper_says(build, key):
    assert build(key).trained == TRAINED[key]


@pytest.mark.parametrize("key", LEARNING, ids=str)
def test_what_is_frozen_stays_and_what_is_trained_moves(build, batch, key):
    contender = build(key)
    before = {name: p.detach().clone() for name, p in contender.model.named_parameters()}
    contender.step(batch)
    contender.step(batch)  # of two factors of which one is zero, the other one moves only now
    selection = contender.selection
    for name, parameter in contender.model.named_parameters():
        if selection is not None and name in selection:
            mask = selection[name].to_dense()
            assert torch.equal(parameter[~mask], before[name][~mask]), name
            moved = mask.any()
        else:
            moved = parameter.requires_grad
        assert moved != torch.equal(parameter, before[name]), name
        if selection is None and not parameter.requires_grad:
            assert parameter.grad is None, name


@pytest.mark.parametrize("key", LEARNING, ids=str)
def test_loss_falls(build, batch, key):
    contender = build(key, 3e-3)
    losses = [contender.step(batch).item() for _ in range(8)]
    assert losses[-1] < 0.97 * losses[0], losses


def test_ours_trains_as_the_published_way_does(build, batch):
    losses = {}
    for name in ("GPS, attached", "GPS as published"):
        contender = build((name, 1))
        losses[name] = torch.stack([contender.step(batch) for _ in range(5)])
    torch.testing.assert_close(*losses.values(), rtol=1e-5, atol=0)


def test_cost_refuses_what_trains_otherwise(base, batch, task, monkeypatch):
    assert vit.check(task, base, batch) == ""
    monkeypatch.setattr(vit, "CHECKED_RATE", 0.0)
    assert "nothing has been learned" in vit.check(task, base, batch)
    monkeypatch.setattr(vit, "CHECKED_RATE", 1e-3)
    monkeypatch.setattr(every, "published", lambda task, policy: every.ours(task, gradsel.PerNeuron(10)))
    assert "differ" in vit.check(task, base, batch)


@pytest.mark.parametrize("key", [("SSF", 0), ("LoRA", 8), ("GPS, attached", 1)], ids=str)
def test_merged_computes_the_same(build, base, batch, key):
    contender = build(key)
    contender.step(batch)
    contender.step(batch)
    expected = contender.predict(batch[0])
    merged = contender.merge(contender.model)
    assert [type(module) for module in merged.modules()] == [type(module) for module in base.modules()]
    with torch.inference_mode():
        torch.testing.assert_close(merged(batch[0]), expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(base(batch[0]), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["adapter (Houlsby)", "adapter (Pfeiffer)"])
def test_adapters_begin_as_the_identity(build, base, batch, name):
    contender = build((name, 64))
    with torch.inference_mode():
        torch.testing.assert_close(contender.predict(batch[0]), base(batch[0]))


def test_precision_of_lora_in_bfloat16(base, batch, task):
    usual, fast = every.loras(task, torch.bfloat16)
    for method, dtype, autocast in ((usual, torch.float32, torch.bfloat16), (fast, torch.bfloat16, None)):
        contender = method.build(copy.deepcopy(base).bfloat16())
        named = list(contender.model.named_parameters())
        assert {p.dtype for name, p in named if "lora_" in name} == {dtype}
        assert {p.dtype for name, p in named if not p.requires_grad} == {torch.bfloat16}
        assert contender.autocast is autocast
        assert contender.step((batch[0].bfloat16(), batch[1])).isfinite()
