"""attach() and detach(): the same training as with dense masked gradients, in every way people train."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import gradsel
from gradsel.attached import selected_in
from gradsel.masks import Flat, Frozen, Mask, PerRow, Whole, WholeColumns, WholeRows
from gradsel.parameters.rules import parameter_rules
from tests.gradsel.toy import Toy, batches, cross_entropy

SEED = 3


def random_selection(model: nn.Module, kind: str = "per-row", k: int = 2, **rules) -> gradsel.Selection:
    """Every ranked parameter gets a random mask of one kind."""
    generator = torch.Generator().manual_seed(SEED)
    masks: dict[str, Mask] = {}
    parameters = dict(model.named_parameters())
    for name, rule in parameter_rules(model, **rules).items():
        shape = tuple(parameters[name].shape)
        if rule.action == "whole":
            masks[name] = Whole(shape)
        elif rule.action == "freeze":
            masks[name] = Frozen(shape, rule.reason)
        else:
            rows, n = rule.view.shape(shape)
            few = torch.randperm(n, generator=generator)[:k].sort().values.to(torch.int32)
            if kind == "per-row":
                cols = torch.rand(rows, n, generator=generator).topk(min(k, n)).indices.sort(1).values
                masks[name] = PerRow(cols.to(torch.int32), shape, rule.view)
            elif kind == "rows":
                picked = torch.randperm(rows, generator=generator)[:k].sort().values.to(torch.int32)
                masks[name] = WholeRows(picked, shape, rule.view)
            elif kind == "columns":
                masks[name] = WholeColumns(few, shape, rule.view)
            elif kind == "irregular":
                masks[name] = Flat.from_dense(torch.rand(shape, generator=generator) < 0.1)
            else:
                masks[name] = Whole(shape)
    return gradsel.Selection(masks)


KINDS = ["per-row", "rows", "columns", "irregular", "whole"]


def mask_gradients(model: nn.Module, selection: gradsel.Selection) -> None:
    """What published code does: the dense gradient times the dense mask."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(selection[name].to_dense())


def frozen_entries(model: nn.Module, selection: gradsel.Selection) -> dict[str, Tensor]:
    own = {name: p for name, p in model.named_parameters() if not name.endswith("_values")}
    return {name: p.detach()[~selection[name].to_dense()].clone() for name, p in own.items()}


def check_frozen(model: nn.Module, selection: gradsel.Selection, before: dict[str, Tensor]) -> None:
    for name, entries in frozen_entries(model, selection).items():
        assert torch.equal(entries, before[name]), name


def check_consistent(model: nn.Module) -> None:
    """Every weight holds its values."""
    for module in model.modules():
        for name, selected in selected_in(module).items():
            weight, values = module._parameters[name], module._parameters[name + "_values"]
            assert torch.equal(selected.mask.gather(weight), values.to(weight.dtype)), selected.name


def toy(kind: str = "per-row", dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    model = Toy().to(dtype)
    return model, random_selection(model, kind, freeze=["unused.*"])


def data(dtype: torch.dtype = torch.float32, count: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [(images.to(dtype), labels) for images, labels in batches(count)]


# --- The same training as with dense gradients -------------------------------------------------------------------


def hugging_face(name: str) -> tuple[nn.Module, list]:
    """A small model built from its transformers configuration, and batches for it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if name == "ViT":
        config = transformers.ViTConfig(
            hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=16,
            patch_size=4, num_labels=5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        model = transformers.ViTForImageClassification(config)
    elif name == "ConvNeXt":
        config = transformers.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1], num_labels=5)
        model = transformers.ConvNextForImageClassification(config)
    elif name == "GPT-2":
        config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=24, n_layer=2, n_head=2, resid_pdrop=0.0,
                                         embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=name == "tied Llama",
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(1)
    if name in ("ViT", "ConvNeXt"):
        size = 16 if name == "ViT" else 32
        inputs = [(torch.randn(4, 3, size, size, generator=generator), torch.randint(0, 5, (4,), generator=generator))
                  for _ in range(4)]  # fmt: skip
    else:
        inputs = [(torch.randint(0, 50, (2, 12), generator=generator),) for _ in range(4)]
    return model.train(), inputs


def model_loss(model: nn.Module, batch: tuple) -> Tensor:
    if len(batch) == 2:
        return F.cross_entropy(model(batch[0].to(model.dtype)).logits, batch[1])
    return model(input_ids=batch[0], labels=batch[0]).loss


RULES = {"tied Llama": {"rank": ["model.embed_tokens.weight"]}, "GPT-2": {"rank": ["transformer.wte.weight"]}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["ViT", "ConvNeXt", "Llama", "tied Llama", "GPT-2"])
def test_double_precision_equals_dense_training_with_masked_gradients(name, kind):
    """By plain gradient descent, which hides no difference behind a normalisation."""
    model, inputs = hugging_face(name)
    model = model.double()
    if name == "ConvNeXt":
        for parameter in model.parameters():  # layer scale starts at 1e-6, which would hide the blocks
            if (
                parameter.ndim == 1
                and bool((parameter == parameter[0]).all())
                and 0 < float(parameter[0].detach()) < 1e-3
            ):
                nn.init.constant_(parameter, 0.5)
    dense = copy.deepcopy(model)
    selection = random_selection(model, kind, **RULES.get(name, {}))
    before = frozen_entries(model, selection)
    gradsel.attach(model, selection)
    gradsel.freeze(dense, selection)
    ours = torch.optim.SGD(gradsel.trainable_parameters(model), lr=0.05)
    for step in range(6):
        batch = inputs[step % len(inputs)]
        losses = []
        for trained in (model, dense):
            trained.zero_grad()
            loss = model_loss(trained, batch)
            loss.backward()
            losses.append(loss.item())
        mask_gradients(dense, selection)
        ours.step()
        with torch.no_grad():
            for parameter in dense.parameters():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=0.05)
        assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    check_frozen(model, selection, before)
    gradsel.detach(model)
    for (name, left), right in zip(model.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("name", ["ViT", "ConvNeXt", "Llama"])
def test_single_precision_loss_curve(name):
    """MaskedAdam on an attached model against torch's Adam on masked gradients."""
    model, inputs = hugging_face(name)
    selection = random_selection(model)
    dense = copy.deepcopy(model)
    gradsel.attach(model, selection)
    gradsel.freeze(dense, selection)
    ours = gradsel.MaskedAdam(gradsel.trainable_parameters(model), lr=1e-3)
    theirs = torch.optim.Adam([p for p in dense.parameters() if p.requires_grad], lr=1e-3)
    for step in range(20):
        batch = inputs[step % len(inputs)]
        losses = []
        for trained, optimizer in ((model, ours), (dense, theirs)):
            optimizer.zero_grad()
            loss = model_loss(trained, batch)
            loss.backward()
            if trained is dense:
                mask_gradients(dense, selection)
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    check_consistent(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_train_in_float32(dtype):
    model, selection = toy(dtype=dtype)
    before = frozen_entries(model, selection)
    gradsel.attach(model, selection)
    values = model.blocks[0].fc1.weight_values
    assert values.dtype is torch.float32
    assert torch.equal(values.detach().to(dtype).float(), values.detach())
    optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(model), lr=1e-5)  # steps too small for the weights
    start = values.detach().clone()
    for batch in data(dtype):
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        optimizer.step()
    assert (values != start).any()
    assert values.grad.dtype is torch.float32
    check_consistent(model)
    check_frozen(model, selection, before)


# --- Routes ------------------------------------------------------------------------------------------------------


class Awkward(nn.Module):
    """Layers that attach() does not know, or that are not called."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up = nn.ConvTranspose1d(8, 8, 3, padding=1)
        self.read_by_parent = nn.Linear(8, 8)
        self.twice = nn.Linear(8, 8)
        self.experts = nn.Parameter(torch.randn(3, 8, 8) / 3)
        self.reflect = nn.Conv1d(8, 8, 3, padding=1, padding_mode="reflect")
        self.same = nn.Conv1d(8, 8, 4, padding="same")
        self.recurrent = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.up(x.mT).mT
        x = F.linear(x, self.read_by_parent.weight, self.read_by_parent.bias).tanh()
        x = self.twice(self.twice(x).tanh())
        x = torch.stack([x[i] @ self.experts[i % 3].t() for i in range(len(x))])
        x = x + self.reflect(x.mT).mT + self.same(x.mT).mT
        return x + self.recurrent(x)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_every_way_of_reading_a_weight(kind, training):
    torch.manual_seed(0)
    model = Awkward().double().train(training)
    dense = copy.deepcopy(model)
    selection = random_selection(model, kind, rank=["experts"])
    report = gradsel.attach(model, selection)
    gradsel.freeze(dense, selection)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    for trained in (model, dense):
        trained(x).square().sum().backward()
    for module in model.modules():
        for short, selected in selected_in(module).items():
            expected = selected.mask.gather(dense.get_parameter(selected.name).grad)
            torch.testing.assert_close(
                module._parameters[short + "_values"].grad, expected, rtol=1e-12, atol=1e-12, msg=selected.name
            )
    if kind != "whole":
        routes = {name: route.route for name, route in report.items()}
        assert routes["attention.in_proj_weight"] == routes["attention.out_proj.weight"] == "harvest"
        assert routes["up.weight"] == routes["experts"] == routes["recurrent.weight_ih_l0"] == "harvest"
        assert routes["twice.weight"] == routes["reflect.weight"] == routes["same.weight"] == "direct"
        assert routes["twice.bias"] == "whole"
        assert "harvest" in str(report)


def test_a_mixture_of_experts():
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).train()
    dense = copy.deepcopy(model)
    selection = random_selection(model)
    report = gradsel.attach(model, selection)
    assert any("experts" in name and route.route == "harvest" for name, route in report.items())
    gradsel.freeze(dense, selection)
    tokens = torch.randint(0, 40, (2, 9))
    for trained in (model, dense):
        trained(input_ids=tokens, labels=tokens).loss.backward()
    for module in model.modules():
        for short, selected in selected_in(module).items():
            expected = selected.mask.gather(dense.get_parameter(selected.name).grad)
            torch.testing.assert_close(module._parameters[short + "_values"].grad, expected, rtol=1e-4, atol=1e-6)


def test_tied_weights_share_their_values():
    model, _ = hugging_face("tied Llama")
    selection = random_selection(model, rank=["model.embed_tokens.weight"])
    gradsel.attach(model, selection)
    assert model.lm_head._parameters["weight_values"] is model.model.embed_tokens._parameters["weight_values"]
    assert len(gradsel.trainable_parameters(model)) == len({id(p) for p in model.parameters() if p.requires_grad})
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert made.lm_head._parameters["weight_values"] is made.model.embed_tokens._parameters["weight_values"]
    gradsel.detach(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


class HalfUsed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_values_without_a_gradient_are_reported_once():
    model = HalfUsed()
    gradsel.attach(model, random_selection(model))
    for optimizer in (gradsel.MaskedAdam(model.parameters()), torch.optim.AdamW(model.parameters())):
        model(torch.randn(3, 4)).sum().backward()
        with pytest.warns(UserWarning, match=r"1 of 2 selected weights got no gradient .*: unused.weight\."):
            optimizer.step()
        optimizer.step()


# --- What people do with a model ---------------------------------------------------------------------------------

OPTIMIZERS = {
    "MaskedAdam": lambda p: gradsel.MaskedAdam(p, lr=1e-2),
    "MaskedAdamW": lambda p: gradsel.MaskedAdamW(p, lr=1e-2),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=1e-2, max_iter=3),
}


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_sees_the_weights_it_tries(search):
    model, selection = toy(dtype=torch.float64)
    model.eval()
    dense = copy.deepcopy(model)
    gradsel.attach(model, selection)
    gradsel.freeze(dense, selection)
    # For the dense model, a parameter of the selected entries, written before every evaluation.
    own = {name: selection[name].gather(p.detach()).requires_grad_() for name, p in dense.named_parameters()
           if p.requires_grad}  # fmt: skip

    def dense_loss() -> Tensor:
        for name, parameter in dense.named_parameters():
            if name in own:
                selection[name].scatter_(parameter.data, own[name].detach())
        dense.zero_grad()
        loss = cross_entropy(dense, data(torch.float64)[0])
        loss.backward()
        for name, parameter in dense.named_parameters():
            if name in own:
                own[name].grad = selection[name].gather(parameter.grad)
        return loss

    def our_loss() -> Tensor:
        model.zero_grad()
        loss = cross_entropy(model, data(torch.float64)[0])
        loss.backward()
        return loss

    settings = {"lr": 0.1, "max_iter": 5, "line_search_fn": search}
    theirs = torch.optim.LBFGS(list(own.values()), **settings)
    ours = torch.optim.LBFGS(gradsel.trainable_parameters(model), **settings)
    for _ in range(2):
        expected, found = theirs.step(dense_loss), ours.step(our_loss)
        assert found.item() == pytest.approx(expected.item(), rel=1e-9)
    check_consistent(model)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", KINDS)
def test_any_optimizer_keeps_the_weights_up_to_date(name, kind):
    model, selection = toy(kind)
    before = frozen_entries(model, selection)
    gradsel.attach(model, selection)
    optimizer = OPTIMIZERS[name](gradsel.trainable_parameters(model))
    for batch in data():

        def closure(batch=batch):
            optimizer.zero_grad()
            loss = cross_entropy(model, batch)
            loss.backward()
            return loss

        optimizer.step(closure)
        check_consistent(model)
    check_frozen(model, selection, before)
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if not name.endswith("_values")}
    gradsel.detach(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, trained[name])
    assert any((p != q).any() for p, q in zip(model.parameters(), toy()[0].parameters(), strict=True))


def test_masked_adam_makes_one_call_and_needs_no_hook(monkeypatch):
    model, selection = toy()
    gradsel.attach(model, selection)
    optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(model))
    calls = []
    original = gradsel.optim.optimizer.gk.masked_adam_
    monkeypatch.setattr(
        gradsel.optim.optimizer.gk, "masked_adam_", lambda *a, **k: calls.append(1) or original(*a, **k)
    )
    monkeypatch.setattr(PerRow, "scatter_", lambda *a: pytest.fail("the kernel writes the weights"))
    cross_entropy(model, data()[0]).backward()
    optimizer.step()
    assert len(calls) == 1
    check_consistent(model)


def test_masks_and_attach_exclude_each_other():
    model, selection = toy()
    gradsel.attach(model, selection)
    with pytest.raises(ValueError, match="leave out masks"):
        gradsel.MaskedAdam(model.named_parameters(), masks=selection)
    with pytest.raises(ValueError, match=r"attached already; call gradsel.detach\(model\) first"):
        gradsel.attach(model, selection)
    with pytest.raises(ValueError, match="attached to a selection"):
        gradsel.select(model, data(), cross_entropy)


def test_gradient_accumulation_and_clipping():
    model, selection = toy(dtype=torch.float64)
    dense = copy.deepcopy(model)
    gradsel.attach(model, selection)
    gradsel.freeze(dense, selection)
    for trained in (model, dense):
        for i, batch in enumerate(data(torch.float64)):
            torch.manual_seed(i)
            (cross_entropy(trained, batch) / 3).backward()
    mask_gradients(dense, selection)
    ours = nn.utils.clip_grad_norm_(gradsel.trainable_parameters(model), 0.1)
    theirs = nn.utils.clip_grad_norm_([p for p in dense.parameters() if p.requires_grad], 0.1)
    assert float(ours) == pytest.approx(float(theirs), rel=1e-12)
    layer = model.blocks[1].qkv
    expected = selected_in(layer)["weight"].mask.gather(dense.blocks[1].qkv.weight.grad)
    torch.testing.assert_close(layer.weight_values.grad, expected, rtol=1e-12, atol=1e-14)


def test_grad_scaler_skips_an_overflow():
    model, selection = toy(dtype=torch.float16)
    before = frozen_entries(model, selection)
    gradsel.attach(model, selection)
    start = copy.deepcopy(model.state_dict())
    parameters = [p for name, p in model.named_parameters() if name.endswith("_values")]  # in float32, as scalers ask
    optimizer = gradsel.MaskedAdam(parameters, lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for i, batch in enumerate(data(torch.float16)):
        optimizer.zero_grad()
        scaler.scale(cross_entropy(model, batch)).backward()
        if i == 0:
            parameters[0].grad[0, 0] = float("inf")
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        scaler.step(optimizer)
        scaler.update()
        unchanged = all(torch.equal(p, start[name]) for name, p in model.state_dict().items() if "bn." not in name)
        assert unchanged == (i == 0)
    assert scaler.get_scale() < 8
    check_consistent(model)
    check_frozen(model, selection, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model, selection = toy()
    dense = copy.deepcopy(model)
    gradsel.attach(model, selection)
    gradsel.freeze(dense, selection)
    for trained in (model, dense):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype):
            loss = cross_entropy(trained, data()[0])
        loss.backward()
    for name, parameter in dense.named_parameters():
        mask = selection[name]
        if mask.kind == "per-row":
            module = model.get_submodule(name.rpartition(".")[0])
            found, expected = module.weight_values.grad, mask.gather(parameter.grad)
            torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02 * float(expected.abs().max()))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    model, selection = toy(dtype=torch.float64)
    gradsel.attach(model, selection)
    x = torch.randn(4, 5, 12, dtype=torch.float64, requires_grad=True)

    def grads(run):
        model.zero_grad()
        run(x).square().sum().backward()
        return [p.grad.clone() for p in model.blocks[0].parameters() if p.requires_grad]

    plain = grads(model.blocks[0])
    again = grads(lambda x: checkpoint(model.blocks[0], x, use_reentrant=reentrant))
    for left, right in zip(plain, again, strict=True):
        assert torch.equal(left, right)


def test_torch_compile_has_no_graph_breaks():
    model, selection = toy()
    gradsel.attach(model, selection)
    x = torch.randn(2, 3, 8, 8)

    def grads(run):
        model.zero_grad()
        torch.manual_seed(0)
        loss = run(x).square().sum()
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in gradsel.trainable_parameters(model) if p.grad is not None)]

    model.eval()
    expected = grads(model)
    torch._dynamo.reset()
    for left, right in zip(expected, grads(torch.compile(model, fullgraph=True, backend="aot_eager")), strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_attached_models_of_their_own(way):
    model, selection = toy()
    gradsel.attach(model, selection)
    if way == "deepcopy":
        made = copy.deepcopy(model)
    elif way == "pickle":
        made = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        made = torch.load(file, weights_only=False)
    untouched = copy.deepcopy(model.state_dict())
    optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(made), lr=0.1)
    cross_entropy(made, data()[0]).backward()
    optimizer.step()
    check_consistent(made)
    assert not torch.equal(made.blocks[0].fc1.weight_values, model.blocks[0].fc1.weight_values)
    model.eval()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, untouched[name])
    gradsel.detach(made, restore=True)
    assert type(made.blocks[0].fc1) is nn.Linear
    assert torch.equal(made.blocks[0].fc1.weight, model.blocks[0].fc1.weight)


def test_a_loaded_model_trains_in_a_process_that_never_attached(tmp_path):
    model, selection = toy()
    gradsel.attach(model, selection)
    torch.save(model, tmp_path / "model.pt")
    script = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
torch.nn.functional.cross_entropy(model(torch.randn(4, 3, 8, 8)), torch.tensor([0, 1, 2, 3])).backward()
optimizer.step()
layer = model.blocks[0].fc1
rows = layer.weight.detach()
assert all((rows[i] == value).any() for i, pair in enumerate(layer.weight_values) for value in pair)
"""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "python")])}
    command = [sys.executable, "-c", script, str(tmp_path / "model.pt")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_recurrent_layers_are_copied_and_cast():
    model = nn.LSTM(4, 4)
    gradsel.attach(model, random_selection(model))
    made = pickle.loads(pickle.dumps(copy.deepcopy(model))).double()
    optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(made), lr=0.1)
    made(torch.randn(3, 4, dtype=torch.float64))[0].sum().backward()
    optimizer.step()
    check_consistent(made)
    assert not torch.equal(made.weight_ih_l0_values.float(), model.weight_ih_l0_values)


def test_an_optimizer_of_before_does_not_touch_a_detached_model():
    model, selection = toy()
    gradsel.attach(model, selection)
    old = torch.optim.SGD(gradsel.trainable_parameters(model), lr=0.1)
    values = [p for p in gradsel.trainable_parameters(model) if p.ndim == 2]
    cross_entropy(model, data()[0]).backward()
    gradsel.detach(model)
    before = model.blocks[0].fc1.weight.clone()
    old.step()
    assert torch.equal(model.blocks[0].fc1.weight, before)
    gradsel.attach(model, selection)
    old.step()
    assert torch.equal(model.blocks[0].fc1.weight, before)
    assert values


def test_a_part_of_a_model_with_tied_weights_goes_on_alone():
    model, _ = hugging_face("tied Llama")
    gradsel.attach(model, random_selection(model, rank=["model.embed_tokens.weight"]))
    body = model.model
    del model
    gc.collect()
    optimizer = torch.optim.SGD(gradsel.trainable_parameters(body), lr=0.1)
    body(input_ids=torch.randint(0, 50, (2, 6))).last_hidden_state.square().sum().backward()
    optimizer.step()
    check_consistent(body)


def test_convolutions_that_were_changed_after_they_were_made():
    layer = nn.Conv2d(3, 4, 3)
    layer.padding, layer.dilation, layer.stride = (2, 2), (2, 2), (2, 2)
    x = torch.randn(1, 3, 9, 9)
    expected = layer(x)
    gradsel.attach(layer, random_selection(layer))
    assert torch.equal(layer(x), expected)


class Casting(nn.Conv1d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight.to(input.dtype), None if bias is None else bias.to(input.dtype))


def test_layers_with_a_forward_of_their_own_are_harvested():
    model = nn.Sequential(Casting(3, 4, 3), nn.Linear(6, 6))
    model[1].forward = lambda x, own=model[1]: F.linear(x, own.weight, own.bias)
    report = gradsel.attach(model, random_selection(model))
    assert report["0.weight"].route == report["1.weight"].route == "harvest"
    model(torch.randn(2, 3, 8)).sum().backward()
    assert model[0].weight_values.grad is not None
    assert model[1].weight_values.grad is not None


@pytest.mark.parametrize("sparse", [False, True])
def test_embeddings_with_sparse_gradients_or_counts(sparse):
    model = nn.Embedding(6, 4, sparse=sparse, scale_grad_by_freq=not sparse)
    dense = nn.Embedding(6, 4, sparse=sparse, scale_grad_by_freq=not sparse)
    dense.load_state_dict(model.state_dict())
    selection = random_selection(model, rank=["weight"])
    gradsel.attach(model, selection)
    tokens = torch.tensor([1, 1, 5])
    for trained in (model, dense):
        trained(tokens).square().sum().backward()
    grad = dense.weight.grad.to_dense() if sparse else dense.weight.grad
    torch.testing.assert_close(model.weight_values.grad, selection["weight"].gather(grad))
    limited = nn.Embedding(6, 4, max_norm=1.0)
    with pytest.raises(ValueError, match="max_norm rescales the whole weight"):
        gradsel.attach(limited, random_selection(limited, rank=["weight"]))


def test_casts_keep_values_in_float32():
    model, selection = toy()
    gradsel.attach(model, selection)
    values = model.blocks[0].fc1.weight_values
    before = values.detach().clone()
    model.to(torch.bfloat16)
    assert model.blocks[0].fc1.weight_values is values
    assert torch.equal(values, before)  # float32, and not rounded on the way
    check_consistent(model)
    cross_entropy(model, data(torch.bfloat16)[0]).backward()
    model.double()
    assert values.dtype is values.grad.dtype is torch.float64
    cross_entropy(model, data(torch.float64)[0]).backward()
    model.float()
    assert values.dtype is torch.float32
    assert gradsel.MaskedAdam(gradsel.trainable_parameters(model)).step() is None
    check_consistent(model)


def test_state_dict_in_the_middle_of_training():
    model, selection = toy()
    base_keys = set(model.state_dict())
    gradsel.attach(model, selection)
    assert base_keys < set(model.state_dict())
    assert {key for key in set(model.state_dict()) - base_keys if not key.endswith("weight_values")} == set()

    def train(model, optimizer, part):
        for i, batch in enumerate(data(count=6)[part]):
            torch.manual_seed(i)
            optimizer.zero_grad()
            cross_entropy(model, batch).backward()
            optimizer.step()

    optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(model), lr=1e-2)
    train(model, optimizer, slice(0, 3))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, slice(3, 6))

    other, _ = toy()
    gradsel.attach(other, selection)
    resumed = gradsel.MaskedAdam(gradsel.trainable_parameters(other), lr=1e-2)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train(other, resumed, slice(3, 6))
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_loading_a_plain_checkpoint_refreshes_the_values():
    model, selection = toy()
    gradsel.attach(model, selection)
    torch.manual_seed(9)
    base = Toy().state_dict()
    model.load_state_dict(base)
    check_consistent(model)
    assert torch.equal(model.blocks[0].fc1._parameters["weight"], base["blocks.0.fc1.weight"])
    values = {name: torch.zeros_like(v) for name, v in model.state_dict().items() if name.endswith("_values")}
    model.load_state_dict(values, strict=False)  # values alone: a fine-tuned difference
    check_consistent(model)
    assert int((model.blocks[0].fc1._parameters["weight"] == 0).sum()) >= 24
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({name: tensor for name, tensor in base.items() if name != "blocks.0.fc1.weight"})


def test_assigned_parameters_are_linked():
    model, selection = toy()
    gradsel.attach(model, selection)
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(model), lr=0.1)
    before = model.blocks[0].fc1.weight_values.detach().clone()
    cross_entropy(model, data()[0]).backward()
    optimizer.step()
    assert not torch.equal(model.blocks[0].fc1.weight_values, before)
    check_consistent(model)


def test_shared_memory_includes_the_values():
    model, selection = toy()
    gradsel.attach(model, selection)
    model.share_memory()
    assert all(parameter.is_shared() for parameter in model.parameters())


def test_sync_writes_values_changed_by_hand():
    model, selection = toy()
    gradsel.attach(model, selection)
    with torch.no_grad():
        model.blocks[0].fc1.weight_values.fill_(7)
    gradsel.sync(model)
    check_consistent(model)
    assert (model.blocks[0].fc1.weight == 7).sum() == 48


@pytest.mark.parametrize("kind", KINDS)
def test_detach_gives_everything_back(kind):
    model, selection = toy(kind)
    model.blocks[0].norm.weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    identities = {name: id(p) for name, p in model.named_parameters()}
    original = copy.deepcopy(model.state_dict())
    printed = repr(model)
    for restore in (False, True):
        gradsel.attach(model, selection)
        optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(model), lr=0.1)
        model.eval()
        for batch in data():
            optimizer.zero_grad()
            cross_entropy(model, batch).backward()
            optimizer.step()
        output = model(data()[0][0])
        assert gradsel.detach(model, restore=restore) is model
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
        assert {name: id(p) for name, p in model.named_parameters()} == identities
        assert repr(model) == printed
        assert not any("gradsel" in key or "_selected" in key for m in model.modules() for key in vars(m))
        if not restore:
            assert torch.equal(model(data()[0][0]), output)
            model.load_state_dict(original)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, original[name]), name
    with pytest.raises(ValueError, match="the model is not attached"):
        gradsel.detach(model)


def test_inference_runs_the_plain_operators():
    """Attached without gradients, and detached: the operators of the plain model, in number and kind."""
    model, selection = toy()
    model.eval()
    x = data()[0][0]

    def operators():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, torch.no_grad():
            model(x)
        return sorted((event.key, event.count) for event in profile.key_averages() if "profiler" not in event.key)

    plain = operators()
    gradsel.attach(model, selection)
    assert operators() == plain
    gradsel.detach(model)
    assert operators() == plain


# --- Refusals ----------------------------------------------------------------------------------------------------


def test_a_selection_of_another_model_changes_nothing():
    model, selection = toy()
    before = (repr(model), [p.requires_grad for p in model.parameters()])
    larger = random_selection(Toy(dim=24))
    fewer = gradsel.Selection({name: mask for name, mask in selection.items() if name != "head.bias"})
    more = gradsel.Selection({**selection, "extra.weight": Whole((3,))})
    whole_number = gradsel.Selection({**selection, "patch_embed.weight": Whole((3, 3))})
    for bad, error, message in [
        (larger, ValueError, "is for shape .* the parameter has .*; select on this model"),
        (fewer, KeyError, "no parameter 'head.bias'"),
        (more, ValueError, "1 parameters that the model lacks .*'extra.weight'"),
        (whole_number, ValueError, r"patch_embed.weight is for shape \[3, 3\]"),
    ]:
        with pytest.raises(error, match=message):
            gradsel.attach(model, bad)
        assert before == (repr(model), [p.requires_grad for p in model.parameters()])
    model.blocks[1].fc1.weight_values = torch.zeros(1)
    with pytest.raises(ValueError, match="has an attribute weight_values already"):
        gradsel.attach(model, selection)
    assert before[1] == [p.requires_grad for p in model.parameters()]


def test_sync_and_detach_of_a_wrapper():
    model, selection = toy()
    gradsel.attach(model, selection)
    wrapped = nn.Sequential(model)
    gradsel.sync(wrapped)
    with pytest.raises(ValueError, match="a module around it"):
        gradsel.detach(model.blocks[0])
    assert gradsel.detach(wrapped) is wrapped
    assert type(model.blocks[0].fc1) is nn.Linear
