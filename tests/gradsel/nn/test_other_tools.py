"""What other libraries do to attached models works, or is refused in words that name the parameter and the way out."""

from __future__ import annotations

import copy
import functools
import json
import sys

import pytest
import torch
import torch.ao.quantization
import torch.nn.parallel
import torch.utils.checkpoint
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import gradsel
from gradsel.attached import SUFFIX
from tests.support.every_layer import (
    NOT_CALLED,
    attached,
    check_forward,
    inputs,
    loss,
    plain_state,
    train,
    trained_in_part,
)
from tests.support.hugging_face import hugging_face
from tests.support.selections import KINDS, PARTIAL, check_consistent, check_frozen, frozen_entries, random_selection

# --- LoRA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_merged_into_weights_and_values(kind: str, safe: bool) -> None:
    peft = pytest.importorskip("peft")
    model, _, selection = attached(kind, torch.float64)
    modules = [path for path, module in model.named_modules() if path in ("linear", "tokens")]
    config = peft.LoraConfig(r=2, target_modules=modules, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    for name, p in adapted.named_parameters():
        p.requires_grad_(p.requires_grad or name.endswith(SUFFIX))
    train(adapted)
    expected = adapted(inputs())
    merged = adapted.merge_and_unload(safe_merge=safe)
    torch.testing.assert_close(merged(inputs()), expected)
    check_consistent(merged)
    if kind != "whole":
        assert set(gradsel.Delta.of(merged)) == {name for name, mask in selection.items() if mask.nnz}


def test_values_that_peft_freezes_are_reported() -> None:
    peft = pytest.importorskip("peft")
    model, *_ = attached("per-row")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["linear"]))
    with pytest.warns(UserWarning, match=r"values of \d+ attached weights do not require gradients.*before attach\(\)"):
        assert not any(map(gradsel.attached.is_values, gradsel.trainable_parameters(adapted)))


# --- Replicas --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_replicas_of_data_parallel(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    replicate = vars(sys.modules["torch.nn.parallel.replicate"])
    monkeypatch.setitem(replicate, "_get_device_index", lambda device, optional: 0)
    monkeypatch.setitem(
        replicate,
        "_broadcast_coalesced_reshape",
        lambda tensors, devices, detach=False: [[t.clone() for t in tensors] for _ in devices],
    )
    model, _, _ = attached(kind, torch.float64)
    model.recurrent = nn.GRU(8, 8, batch_first=True).double().requires_grad_(False)  # replicas of it want GPUs
    with torch.no_grad():
        for _, module, short in trained_in_part(model):
            module._parameters[short + SUFFIX].mul_(1.5)  # not in the weight yet
    loss(model).backward()
    expected = [p.grad.clone() for p in gradsel.trainable_parameters(model)]
    model.zero_grad()
    replicas = replicate["replicate"](model, [torch.device("cpu")] * 2)
    loss(replicas[1]).backward()
    for p, grad in zip(gradsel.trainable_parameters(model), expected, strict=True):
        torch.testing.assert_close(p.grad, grad)


# --- Modules that change ---------------------------------------------------------------------------------------------


def test_tied_weights_are_tied_again_and_not_resized() -> None:
    model, _ = hugging_face("tied Llama")
    gradsel.attach(model, random_selection(model, rank=["model.embed_tokens.weight"]))
    weight = model.get_parameter("model.embed_tokens.weight")
    model.tie_weights()
    model.lm_head.weight = model.model.embed_tokens.weight
    assert model.lm_head.weight is model.model.embed_tokens.weight is weight
    with pytest.raises(RuntimeError, match=r"embed_tokens.weight .*gradsel.detach\(model\)"):
        model.resize_token_embeddings(60)
    assert model.get_input_embeddings().weight is weight
    assert model.lm_head.weight is weight
    assert model.lm_head.weight.shape[0] == model.config.vocab_size == 50
    with pytest.raises(RuntimeError, match=r"embed_tokens.weight .*shared by 2 modules"):
        model.lm_head.weight = nn.Parameter(weight.detach().clone())
    assert model.lm_head.weight is weight


@pytest.mark.parametrize("kind", KINDS)
def test_tied_weights_stay_tied_when_a_checkpoint_is_assigned(kind: str) -> None:
    model, _ = hugging_face("tied Llama")
    gradsel.attach(model, random_selection(model, kind, rank=["model.embed_tokens.weight"]))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    embedding, head = model.model.embed_tokens, model.lm_head
    assert head._parameters.get("weight_values") is embedding._parameters.get("weight_values")
    assert head.weight is embedding.weight
    gradsel.Delta.of(model)


@pytest.mark.parametrize("kind", PARTIAL)
def test_pruned_weights_train_under_their_new_name(kind: str) -> None:
    model, plain, selection = attached(kind)
    before = frozen_entries(model, selection)
    called = [
        (path, module) for path, module, short in trained_in_part(model) if short == "weight" and path not in NOT_CALLED
    ]
    for _, module in called:
        prune.identity(module, "weight")
    train(model)
    assert all(module.weight_values.grad is not None for _, module in called)
    for _, module in called:
        prune.remove(module, "weight")
    check_forward(model, plain)
    check_frozen(model, selection, before)


@pytest.mark.parametrize(
    "make",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        lambda module: parametrize.register_parametrization(module, "weight", nn.Identity()),
    ],
    ids=["weight_norm", "spectral_norm", "orthogonal", "identity"],
)
@pytest.mark.parametrize("kind", PARTIAL)
def test_parametrisations_are_refused_when_they_are_registered(kind: str, make) -> None:
    model, plain, _ = attached(kind)
    before = copy.deepcopy(model.state_dict())
    for path, module, short in trained_in_part(model):
        if short != "weight" or module.weight.ndim < 2:
            continue
        with pytest.raises(RuntimeError, match=rf"{path}.{short} .*gradsel\.detach\(model\)"):
            make(module)
        assert not parametrize.is_parametrized(module)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    check_forward(model, plain)


@pytest.mark.parametrize("kind", PARTIAL)
@pytest.mark.filterwarnings("ignore")
def test_the_former_weight_norm_is_refused_at_the_next_forward(kind: str) -> None:
    """It deletes the weight before it registers anything, so earlier there would be nothing to put back."""
    model, plain, _ = attached(kind)
    for path, module, short in trained_in_part(model):
        if short != "weight" or path in NOT_CALLED:
            continue
        torch.nn.utils.weight_norm(module)
        with pytest.raises(RuntimeError, match=rf"{path}.{short}.*gradsel\.detach\(model\)"):
            model(inputs())
        torch.nn.utils.remove_weight_norm(module)
        model(inputs())
    assert plain is not None


@pytest.mark.parametrize("kind", KINDS)
def test_modules_that_were_moved_or_wrapped(kind: str) -> None:
    """Deltas use the names at attach(), and everything is restored."""
    model, plain, selection = attached(kind)
    base = copy.deepcopy(plain)
    model.linear = nn.Sequential(nn.Dropout(0.0), model.linear)
    model.norm = nn.Sequential(model.norm)
    model.head = nn.Sequential(nn.Dropout(0.0), model.head)
    train(model)
    delta = gradsel.Delta.of(model)
    assert delta.trainable_count() == sum(mask.nnz for mask in selection.values())
    gradsel.load_delta(base, delta)
    assert torch.equal(base(inputs()), model(inputs()))
    gradsel.detach(model, restore=True)
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("kind", KINDS)
def test_trained_modules_that_were_taken_out_are_missed(kind: str) -> None:
    model, _, _ = attached(kind)
    train(model)
    model.linear = nn.Identity()
    for use in (gradsel.Delta.of, lambda model: gradsel.detach(model, restore=True)):
        with pytest.raises(ValueError, match=r"linear\.(weight|bias)"):
            use(model)


# --- Hooks and classes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_detach_after_forwards_were_captured(kind: str) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model, plain, _ = attached(kind)
    for module in (model.linear, model.line, model.tokens, model.conv1d, model.recurrent):
        hooks.add_hook_to_module(module, hooks.ModelHook())
    model.up.forward = functools.partial(type(model.up).forward, model.up)
    train(model)
    state = plain_state(model, plain)
    gradsel.detach(model)
    plain.load_state_dict(state)
    expected = plain(inputs())
    assert torch.equal(model(inputs()), expected)
    for module in model.modules():
        if hasattr(module, "_hf_hook"):
            hooks.remove_hook_from_module(module)
    assert torch.equal(model(inputs()), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_classes_are_the_users(kind: str, tmp_path) -> None:
    model, plain, _ = attached(kind)
    for (path, module), other in zip(model.named_modules(), plain.modules(), strict=True):
        assert type(module) is type(other), path
    llama, _ = hugging_face("tied Llama")
    gradsel.attach(llama, random_selection(llama, kind))
    llama.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [type(llama).__name__]


# --- Optimizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PARTIAL)
def test_what_a_frozen_weight_cannot_do_is_refused(kind: str) -> None:
    model, plain, _ = attached(kind)
    for path, module, short in trained_in_part(model):
        weight, name = module._parameters[short], f"{path}.{short}".removeprefix(".")
        for use in (
            weight.requires_grad_,
            lambda weight=weight: setattr(weight, "requires_grad", True),
            lambda weight=weight: torch.autograd.grad(loss(model), weight),
            lambda weight=weight: torch.autograd.grad(loss(model), [weight]),
            lambda weight=weight: weight.register_hook(print),
            lambda weight=weight: nn.Parameter(weight),
        ):
            with pytest.raises(RuntimeError, match=rf"{name}.*{name}{SUFFIX}.*gradsel\.detach"):
                use()
    check_forward(model, plain)


@pytest.mark.parametrize("kind", PARTIAL)
def test_an_optimizer_of_weights_without_values_warns(kind: str) -> None:
    model, _, _ = attached(kind)
    optimizer = torch.optim.SGD([p for name, p in model.named_parameters() if not name.endswith(SUFFIX)], lr=0.1)
    loss(model).backward()
    with pytest.warns(UserWarning, match=r"weight.*trainable_parameters\(model\)"):
        optimizer.step()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_an_optimizer_of_whole_matrices_warns() -> None:
    model, _, _ = attached("per-row")
    loss(model).backward()
    optimizer = torch.optim.Muon([model.linear.weight_values])
    with pytest.warns(UserWarning, match=r"Muon makes .*linear.weight_values .*MaskedAdam"):
        optimizer.step()


@pytest.mark.parametrize("forward", [torch.nn.functional.linear, lambda x, w: x @ w.T])
def test_a_weight_that_was_moved_without_its_values_is_missed(forward) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    gradsel.attach(model, random_selection(model, rank=["*weight"]))
    weight, x = model[0].weight, torch.randn(4, 8)
    model[0] = nn.Linear(8, 8)
    model[0].weight = weight
    with pytest.raises(RuntimeError, match=r"0.weight is attached and in use.*gradsel.detach\(model\)"):
        forward(x, weight)
    with torch.no_grad():
        forward(x, weight)


@pytest.mark.parametrize("make", [gradsel.MaskedAdam, torch.optim.AdamW])
@pytest.mark.parametrize("kind", PARTIAL)
def test_an_optimizer_of_values_that_were_replaced_raises(kind: str, make) -> None:
    model, _, _ = attached(kind)
    optimizer = make(gradsel.trainable_parameters(model))
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    loss(model).backward()
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.zeros_like(p)
    with pytest.raises(RuntimeError, match=SUFFIX):
        optimizer.step()


@pytest.mark.parametrize("kind", PARTIAL)
def test_parameters_given_to_functional_call_stay_the_users(kind: str) -> None:
    model, plain, _ = attached(kind)
    own = {name: p for name, p in model.named_parameters() if name.endswith(SUFFIX)}
    others = {name: nn.Parameter(p.detach() * 2) for name, p in own.items()}
    optimizer = torch.optim.SGD(others.values(), lr=0.1)
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        optimizer.zero_grad()
        torch.func.functional_call(model, others, (inputs(),)).square().sum().backward()
        optimizer.step()
    assert all(type(p) is nn.Parameter and p.grad is not None for p in others.values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    check_forward(model, plain)


# --- Functions of other kinds -------------------------------------------------------------------------------------


class OwnLinear(torch.autograd.Function):
    """As kernels of other libraries are called."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.T @ x if ctx.needs_input_grad[1] else None


def test_autograd_functions_are_given_the_weight_differentiably_or_not_at_all() -> None:
    model, plain, selection = attached(dtype=torch.float64)
    weight, x = model.linear.weight, torch.randn(3, 8).double().requires_grad_()
    for use in (
        OwnLinear.apply,
        lambda x, w: torch.utils.checkpoint.checkpoint(OwnLinear.apply, x, w, use_reentrant=True),
    ):
        with pytest.raises(RuntimeError, match=r"linear.weight .*weight.view_as\(weight\).*linear.weight_values"):
            use(x, weight)
        with torch.no_grad():
            assert torch.equal(use(x, weight), x @ plain.linear.weight.T)
        model.zero_grad()
        plain.zero_grad()
        use(x, weight.view_as(weight)).square().sum().backward()
        use(x, plain.linear.weight).square().sum().backward()
        expected = selection["linear.weight"].gather(plain.linear.weight.grad)
        torch.testing.assert_close(model.linear.weight_values.grad, expected)
        use(x, weight.detach()).sum().backward()


def test_transforms_of_torch_func_are_refused() -> None:
    model, _, _ = attached()
    values = {"linear.weight_values": model.linear.weight_values.detach()}

    def scalar(values):
        return torch.func.functional_call(model, values, (inputs(),)).sum()

    with pytest.raises(RuntimeError, match=r"torch.func transforms .*gradsel.detach\(model\)"):
        torch.func.grad(scalar)(values)
    linear = nn.Linear(8, 8)
    gradsel.attach(linear, random_selection(linear, rank=["weight"]))
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(torch.ones(2, 8), torch.ones(2, 8))
        with pytest.raises(RuntimeError, match=r"forward-mode .*gradsel.detach\(model\)"):
            linear(x)


def test_dynamically_quantised_copies_hold_the_values() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    plain = copy.deepcopy(model)
    gradsel.attach(model, random_selection(model, rank=["*weight"]))
    with torch.no_grad():
        model[0].weight_values.add_(1.0)
    plain.load_state_dict(plain_state(model, plain))
    x = torch.randn(4, 8)
    found, expected = (torch.ao.quantization.quantize_dynamic(each, {nn.Linear}) for each in (model, plain))
    assert torch.equal(found(x), expected(x))


def test_a_model_made_in_inference_mode_is_refused_as_a_whole() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    selection = random_selection(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)))
    with pytest.raises(ValueError, match=r"0\.\w+ was made in torch\.inference_mode"):
        gradsel.attach(model, selection)
    assert not gradsel.attached.is_attached(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_selected_and_attached_in_inference_mode() -> None:
    torch.manual_seed(0)
    model, batch = nn.Linear(8, 3), (torch.randn(4, 8), torch.tensor([0, 1, 2, 0]))
    with torch.inference_mode():
        selection = gradsel.select(model, [batch], gradsel.cross_entropy, rank=["weight"])
        gradsel.attach(model, selection)
    gradsel.cross_entropy(model, batch).backward()
    gradsel.MaskedAdam(gradsel.trainable_parameters(model), lr=0.1).step()
    check_consistent(model)
    assert model.weight_values.grad.any()


def test_the_former_fsdp_is_refused() -> None:
    class FullyShardedDataParallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._flat_param = nn.Parameter(torch.zeros(9))

    for call in (
        lambda model: gradsel.select(model, [], gradsel.cross_entropy),
        lambda model: gradsel.attach(model, random_selection(nn.Linear(3, 3))),
    ):
        with pytest.raises(ValueError, match=r"FullyShardedDataParallel.*fully_shard"):
            call(nn.Sequential(FullyShardedDataParallel()))


def test_deltas_miss_what_was_unfrozen_after_attach() -> None:
    model, _, selection = attached(dtype=torch.float64)
    name, frozen = next((n, p) for n, p in model.named_parameters() if n in selection and not selection[n].nnz)
    frozen.requires_grad_(True)
    for call in (gradsel.Delta.of, lambda model: gradsel.detach(model, restore=True)):
        with pytest.raises(ValueError, match=f"selection freezes require grad now, first {name}, .*whole="):
            call(model)
    frozen.requires_grad_(False)
    assert name not in gradsel.Delta.of(model)


def test_parameters_that_accelerate_replaces_are_missed() -> None:
    modeling = pytest.importorskip("accelerate.utils")
    model, _, _ = attached()
    modeling.set_module_tensor_to_device(model, "linear.weight", "cpu", value=torch.zeros(8, 8))
    with pytest.raises(RuntimeError, match=r"linear.weight has been replaced .*gradsel.detach\(model\)"):
        model(inputs())
