"""What other libraries do to attached models works, or is refused in words that name the parameter and the way out."""

from __future__ import annotations

import copy
import functools
import json
import sys
import warnings

import pytest
import torch
import torch.nn.parallel
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import gradsel
from gradsel.attached import SUFFIX, selected_in
from gradsel.masks import Flat
from tests.support.every_layer import RULES, EveryLayer, check_forward, every_layer, inputs, loss, plain_state
from tests.support.hugging_face import hugging_face
from tests.support.selections import KINDS, check_consistent, check_frozen, frozen_entries, random_selection

#: Modules whose weights another one reads.
NOT_CALLED = ("read_by_parent", "attention.out_proj")
PARTIAL = [kind for kind in KINDS if kind != "whole"]


def attached(kind: str = "per-row", dtype: torch.dtype = torch.float32):
    model = every_layer(dtype)
    plain = copy.deepcopy(model)
    selection = random_selection(model, kind, **RULES)
    gradsel.attach(model, selection)
    return model, plain, selection


class NotRecurrent(nn.Module):
    def forward(self, x):
        return (x.tanh(),)


def train(model: nn.Module, steps: int = 2, optimizer: torch.optim.Optimizer | None = None) -> None:
    optimizer = optimizer or gradsel.MaskedAdam(gradsel.trainable_parameters(model), lr=0.01)
    for step in range(steps):
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()


def weights(model: nn.Module):
    """(path, module, name in it) of everything that is trained in part."""
    return [(path, module, short) for path, module in model.named_modules() for short in selected_in(module)]


# --- LoRA --------------------------------------------------------------------------------------------------------


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


# --- Replicas ----------------------------------------------------------------------------------------------------


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
        for _, module, short in weights(model):
            module._parameters[short + SUFFIX].mul_(1.5)  # not in the weight yet
    loss(model).backward()
    expected = [p.grad.clone() for p in gradsel.trainable_parameters(model)]
    model.zero_grad()
    replicas = replicate["replicate"](model, [torch.device("cpu")] * 2)
    loss(replicas[1]).backward()
    for p, grad in zip(gradsel.trainable_parameters(model), expected, strict=True):
        torch.testing.assert_close(p.grad, grad)


# --- Modules that change ------------------------------------------------------------------------------------------


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
    called = [(path, module) for path, module, short in weights(model) if short == "weight" and path not in NOT_CALLED]
    for _, module in called:
        prune.identity(module, "weight")
    train(model)
    assert all(module.weight_values.grad is not None for _, module in called)
    for _, module in called:
        prune.remove(module, "weight")
    check_forward(model, plain)
    check_frozen(model, selection, before)


@pytest.mark.parametrize(
    "make", [parametrizations.weight_norm, parametrizations.spectral_norm, torch.nn.utils.weight_norm]
)
@pytest.mark.parametrize("kind", PARTIAL)
@pytest.mark.filterwarnings("ignore")
def test_reparametrised_weights_are_refused(kind: str, make) -> None:
    for path, _, short in weights(attached(kind)[0]):
        model, plain, _ = attached(kind)
        module = model.get_submodule(path)
        if short != "weight" or path in NOT_CALLED:
            continue

        def use(module=module, model=model):
            make(module)
            model(inputs())

        with pytest.raises(RuntimeError, match=rf"{path}.{short}.*gradsel\.detach\(model\)"):
            use()
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
        if "weight_g" in module._parameters:
            torch.nn.utils.remove_weight_norm(module)
            continue
        check_forward(model, plain)


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
    assert delta.trained_count() == sum(mask.nnz for mask in selection.values())
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


# --- Checkpoints --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_loaded_after_attach_is_the_new_base(kind: str) -> None:
    model, _, _ = attached(kind)
    pretrained = every_layer(seed=7)
    with pytest.warns(UserWarning, match="base"):
        model.load_state_dict(pretrained.state_dict(), strict=False)
    state = copy.deepcopy(model.state_dict())
    held = {"lr": 0.05, "anchor": 9.0, "anchor_decoupled": True}
    train(model, 30, gradsel.MaskedAdam(gradsel.trainable_parameters(model), **held))
    for name, tensor in model.state_dict().items():
        assert (tensor - state[name]).abs().max() < 0.2, name  # near where 30 steps of 0.05 began
    tuned = copy.deepcopy(pretrained)
    gradsel.load_delta(tuned, gradsel.Delta.of(model))
    assert torch.equal(tuned(inputs()), model(inputs()))
    gradsel.detach(model, restore=True)
    for (name, p), q in zip(model.named_parameters(), pretrained.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("metadata", [True, False])
@pytest.mark.parametrize("kind", PARTIAL)
def test_values_of_another_selection_are_refused(kind: str, metadata: bool) -> None:
    model, plain, selection = attached(kind)
    before = copy.deepcopy(model.state_dict())
    for name, mask in selection.items():
        other_entries = mask.to_dense().flip(-1)
        if not mask.nnz or mask.is_whole or torch.equal(other_entries, mask.to_dense()):
            continue
        other = every_layer(seed=3)
        masks = {key: Flat.from_dense(each.to_dense()) if each.nnz else each for key, each in selection.items()}
        own = copy.deepcopy(plain)
        gradsel.attach(own, gradsel.Selection(masks))
        gradsel.attach(other, gradsel.Selection({**masks, name: Flat.from_dense(other_entries)}))
        state = other.state_dict()
        with pytest.raises(RuntimeError, match=rf"{name}{SUFFIX} .*another selection"):
            own.load_state_dict(state if metadata else dict(state))
        assert all(
            torch.equal(tensor, before[key]) for key, tensor in own.state_dict().items() if key in plain.state_dict()
        )


@pytest.mark.parametrize("kind", KINDS)
def test_shards_in_any_order_resume_exactly(kind: str) -> None:
    model, _, selection = attached(kind, torch.bfloat16)
    train(model)
    items = [(name, tensor.clone()) for name, tensor in model.state_dict().items()]
    for order in (items, items[::-1], items[1::2] + items[::2]):
        other = every_layer(torch.bfloat16)
        gradsel.attach(other, selection)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a shard of weights alone is taken for a plain checkpoint at first
            for start in range(0, len(order), 7):
                other.load_state_dict(dict(order[start : start + 7]), strict=False)
        for name, tensor in items:
            assert torch.equal(other.state_dict()[name], tensor), name


def test_a_checkpoint_with_whole_parameters_only_resumes_where_it_stopped() -> None:
    """Its metadata tells it from a plain one, so the base stays."""
    model, plain, selection = attached("whole")
    train(model)
    other = copy.deepcopy(plain)
    gradsel.attach(other, selection)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    gradsel.detach(other, restore=True)
    for p, q in zip(other.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_state_dict_taken_before_values_were_written_loads() -> None:
    """Its weights are older than its values, which count."""
    model, _, selection = attached()
    state = model.state_dict()
    with torch.no_grad():
        for _, module, short in weights(model):
            module._parameters[short + SUFFIX].add_(1.0)
    other = every_layer()
    gradsel.attach(other, selection)
    other.load_state_dict(copy.deepcopy(state))
    check_consistent(other)
    assert torch.equal(other(inputs()), model(inputs()))


# --- Hooks, classes and conversions -------------------------------------------------------------------------------


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


@pytest.fixture
def swapping():
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("swapping")
def test_conversions_that_swap_parameters(kind: str) -> None:
    model = every_layer()
    model.recurrent = NotRecurrent()  # torch cannot swap those of recurrent layers
    plain = copy.deepcopy(model)
    selection = random_selection(model, kind, **RULES)
    gradsel.attach(model, selection)
    model.double()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    check_forward(model, plain.double())
    frozen = frozen_entries(model, selection)
    train(model)
    check_frozen(model, selection, frozen)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    check_forward(model, plain)
    model.float()
    train(model)
    gradsel.detach(model)
    assert all(type(p) is nn.Parameter for p in model.parameters())


@pytest.mark.parametrize("kind", PARTIAL)
def test_conversions_that_overwrite_parameters_are_refused(kind: str) -> None:
    model, plain, _ = attached(kind)
    train(model)
    state = plain_state(model, plain)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    with pytest.raises(RuntimeError, match=r"experts has been replaced .*gradsel\.detach\(model\)"):
        model(inputs())
    gradsel.detach(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name].double()), name
    plain.double().load_state_dict(state)
    assert torch.equal(model(inputs()), plain(inputs()))


# --- Tensors of other kinds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["jagged", "sparse"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_jagged_and_sparse_inputs(kind: str, layout: str) -> None:
    torch.manual_seed(0)
    dense, model = nn.Linear(6, 4).double(), nn.Linear(6, 4).double()
    model.load_state_dict(dense.state_dict())
    selection = random_selection(model, kind, rank=["weight"])
    gradsel.attach(model, selection)
    if layout == "jagged":
        parts = [torch.randn(3, 6).double(), torch.randn(5, 6).double()]
        x = torch.nested.nested_tensor(parts, layout=torch.jagged)
    else:
        x = torch.randn(4, 6).double().relu().to_sparse()
    for each in (model, dense):
        output = each(x)
        (output.values() if layout == "jagged" else output).square().sum().backward()
    trained = model.weight if kind == "whole" else model.weight_values
    torch.testing.assert_close(trained.grad, selection["weight"].gather(dense.weight.grad).view_as(trained))


@pytest.mark.parametrize("kind", KINDS)
def test_strided_parameters(kind: str) -> None:
    """Selected, attached, trained and saved as contiguous ones are."""
    results = []
    for strided in (False, True):
        model = every_layer(torch.float64)
        if strided:
            for module in model.modules():
                for short, p in list(module._parameters.items()):
                    if p is not None and p.ndim > 1 and not isinstance(module, nn.GRU):
                        wide = torch.stack([p.detach(), torch.zeros_like(p)], -1)
                        setattr(module, short, nn.Parameter(wide[..., 0]))
                        assert not module._parameters[short].is_contiguous()
        plain = copy.deepcopy(model)
        selection = random_selection(model, kind, **RULES)
        gradsel.attach(model, selection)
        train(model, 3)
        gradsel.load_delta(plain, gradsel.Delta.of(model))
        for name, p in plain.named_parameters():
            assert torch.equal(p, model.get_parameter(name)), name
        results.append(gradsel.Delta.of(model))
    for name, part in results[0].items():
        torch.testing.assert_close(part.values, results[1][name].values)


class Quantised(nn.Linear):
    """A layer as bitsandbytes stores it."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(8, 8)
        self.weight = nn.Parameter(torch.ones(8, 8, dtype=dtype), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_quantised_weights_are_refused_unless_frozen_by_name(dtype: torch.dtype) -> None:
    model = nn.Sequential(Quantised(dtype), nn.Linear(8, 4))
    batch = (torch.randn(3, 8), torch.tensor([0, 1, 3]))

    def cross_entropy(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    with pytest.raises(ValueError, match=r"0\.weight"):
        gradsel.select(model, [batch], cross_entropy, gradsel.PerNeuron(2), rank=["1.weight"])
    selection = gradsel.select(
        model, [batch], cross_entropy, gradsel.PerNeuron(2), rank=["1.weight"], freeze=["0.weight"]
    )
    gradsel.attach(model, selection)
    assert gradsel.trainable_parameters(model)


def test_weights_of_torchao_are_refused_unless_frozen_by_name() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), lambda module, name: name == "0")
    batch = (torch.randn(4, 64), torch.tensor([0, 1, 2, 0]))

    def cross_entropy(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    with pytest.raises(ValueError, match=r"0\.weight"):
        gradsel.select(model, [batch], cross_entropy, rank=["2.weight"])
    gradsel.attach(model, gradsel.select(model, [batch], cross_entropy, rank=["2.weight"], freeze=["0.weight"]))


# --- Optimizers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PARTIAL)
def test_what_a_frozen_weight_cannot_do_is_refused(kind: str) -> None:
    model, plain, _ = attached(kind)
    for path, module, short in weights(model):
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


# --- torch.compile, and memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PARTIAL)
def test_compiled_as_one_graph(kind: str) -> None:
    model: EveryLayer = every_layer()
    model.recurrent = NotRecurrent()  # torch.compile takes no recurrent layers
    gradsel.attach(model, random_selection(model, kind, **RULES))
    eager = copy.deepcopy(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for each in (compiled, eager):
        train(each)
    for (name, p), q in zip(model.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


class Asking(nn.Module):
    """Looks at its weight while it is compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        weight = self.layer.weight
        return self.layer(x.to(weight.device, weight.dtype)) * weight.shape[0]


def test_metadata_of_weights_is_read_in_a_compiled_forward() -> None:
    model = Asking()
    gradsel.attach(model, random_selection(model))
    x = torch.randn(2, 4)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
    assert model.layer.weight_values.grad is not None


def test_exported_and_traced_models_are_those_of_the_values() -> None:
    model, _, _ = attached()
    train(model)
    model.eval()
    with torch.no_grad():
        expected = model(inputs())
        assert torch.equal(torch.export.export(model, (inputs(),)).module()(inputs()), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, (inputs(),), check_trace=False)
    torch.testing.assert_close(traced(inputs()), expected)


@pytest.mark.parametrize("make", [gradsel.MaskedAdam, torch.optim.AdamW])
def test_memory_is_freed_with_the_model(make) -> None:
    import gc
    import weakref

    model, plain, _ = attached()
    optimizer = make(gradsel.trainable_parameters(model))
    train(model, optimizer=optimizer)
    alive = [weakref.ref(p) for p in model.parameters()]
    gc.collect()
    gc.disable()
    try:
        del model, optimizer
        assert not any(reference() is not None for reference in alive)
    finally:
        gc.enable()
    assert plain is not None
