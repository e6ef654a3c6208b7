"""Deltas as LoRA adapters, against PEFT itself and the rules by which vLLM accepts adapters."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

import gradsel
from gradsel.cli import main as cli
from gradsel.delta.delta import Delta
from tests.support.deltas import plain
from tests.support.lora_server import LLAMA_MODULES, accept

peft = pytest.importorskip("peft")
IDS = torch.arange(12).view(2, 6)
LAYERS = {"freeze": ["*norm*", "*embed*", "lm_head*"]}


def llama(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, **{"tie_word_embeddings": False} | changes,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval().to(dtype)


def tuned(base, policy, seed=1, **rules):
    """A trained copy of a base and its delta."""
    model = copy.deepcopy(base)
    selection = gradsel.select(model, None, None, policy, "random", progress=False, **rules or LAYERS)
    gradsel.attach(model, selection)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in gradsel.trainable_parameters(model):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    gradsel.sync(model)
    return plain(model).eval(), Delta.of(model)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def adapted(base, folder, name="default"):
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder, adapter_name=name)


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize(
    ("policy", "rank"),
    [(gradsel.Columns(3), 3), (gradsel.Rows(3), 3), (gradsel.PerNeuron(1, columns=8), 8), (gradsel.PerNeuron(2), None)],
    ids=["columns", "rows", "budget", "neurons"],
)
def test_the_adapter_is_the_delta(policy, rank, tmp_path):
    base = llama()
    trained, delta = tuned(base, policy)
    export = delta.to_lora(tmp_path, base)
    assert rank in (None, export.rank)
    model = adapted(base, tmp_path)
    torch.testing.assert_close(logits(model), logits(trained), rtol=0, atol=1e-6)
    assert not torch.allclose(logits(trained), logits(base), atol=1e-3)
    helper = accept(tmp_path, LLAMA_MODULES, max_lora_rank=64)
    assert all(helper.scaling(module) == 1 for module in export.ranks)
    merged = model.merge_and_unload()
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(parameter, trained.get_parameter(name), rtol=0, atol=1e-6, msg=name)


def test_a_model_in_bfloat16_errs_as_torch_does(tmp_path):
    base = llama(torch.bfloat16)
    trained, delta = tuned(base, gradsel.Columns(3))
    delta.to_lora(tmp_path, base)
    exact = logits(copy.deepcopy(trained).float())
    torchs = (logits(trained) - exact).abs().max()
    assert (logits(adapted(base, tmp_path)) - exact).abs().max() <= 2 * torchs
    merged = adapted(base, tmp_path).merge_and_unload()
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(parameter, trained.get_parameter(name), rtol=2**-7, atol=0, msg=name)


def test_several_adapters_serve_from_one_base(tmp_path):
    base = llama()
    tasks = {name: tuned(base, policy, seed=number) for number, (name, policy) in enumerate(
        {"a": gradsel.Columns(3), "b": gradsel.Rows(2), "c": gradsel.PerNeuron(1, columns=4)}.items()
    )}  # fmt: skip
    for name, (_, delta) in tasks.items():
        delta.to_lora(tmp_path / name, base)
    model = adapted(base, tmp_path / "a", "a")
    for name in "bc":
        model.load_adapter(tmp_path / name, adapter_name=name)
    for name in "bacb":
        model.set_adapter(name)
        torch.testing.assert_close(logits(model), logits(tasks[name][0]), rtol=0, atol=1e-6)


def test_originals_in_the_delta_stand_in_for_the_base(tmp_path):
    base = llama()
    trained, delta = tuned(base, gradsel.Columns(3))
    delta.save(tmp_path / "with", originals=True)
    delta.save(tmp_path / "without")
    with pytest.raises(ValueError, match=r"original entries of .* are not known, .*pass base="):
        Delta.load(tmp_path / "without").to_lora(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    Delta.load(tmp_path / "with").to_lora(tmp_path / "adapter")
    torch.testing.assert_close(logits(adapted(base, tmp_path / "adapter")), logits(trained), rtol=0, atol=1e-6)
    accept(tmp_path / "adapter", LLAMA_MODULES, max_lora_rank=8)
    with pytest.raises(ValueError, match="not what the delta was made on"):
        Delta.load(tmp_path / "without").to_lora(tmp_path / "other", trained)


def test_padding_makes_all_ranks_equal(tmp_path):
    base = llama()
    trained, delta = tuned(base, gradsel.PerNeuron(1))
    loose, padded = delta.to_lora(tmp_path / "loose", base), delta.to_lora(tmp_path / "padded", base, pad=True)
    assert len(set(loose.ranks.values())) > 1
    assert config_of(tmp_path / "loose")["rank_pattern"]
    assert not config_of(tmp_path / "padded")["rank_pattern"]
    assert padded.nbytes > loose.nbytes
    tensors = load_file(tmp_path / "padded/adapter_model.safetensors")
    assert {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name} == {padded.rank}
    torch.testing.assert_close(logits(adapted(base, tmp_path / "padded")), logits(trained), rtol=0, atol=1e-6)


def test_names_of_layers_are_short_where_they_mean_no_others(tmp_path):
    base = llama()
    only = {"freeze": ["*norm*", "*embed*", "lm_head*", "*layers.1.mlp*"]}
    trained, delta = tuned(base, gradsel.Columns(2), **only)
    delta.to_lora(tmp_path, base)
    targets = config_of(tmp_path)["target_modules"]
    assert "q_proj" in targets
    assert "up_proj" not in targets
    assert "model.layers.0.mlp.up_proj" in targets
    model = adapted(base, tmp_path)
    assert "lora_A" not in dict(model.get_base_model().model.layers[1].mlp.up_proj.named_children())
    torch.testing.assert_close(logits(model), logits(trained), rtol=0, atol=1e-6)


def test_a_rank_that_is_too_low(tmp_path):
    base = llama()
    trained, delta = tuned(base, gradsel.Columns(5))
    with pytest.raises(ValueError, match=r"14 of 14 layers need a rank above rank=2, .* with 5; .*svd.*split"):
        delta.to_lora(tmp_path / "refused", base, rank=2)
    assert not (tmp_path / "refused").exists()

    split = delta.to_lora(tmp_path / "split", base, rank=2, above="split")
    assert len(split.folders) == 3
    assert split.rank == 2
    model = adapted(base, split.folders[0], "part-1")
    for folder in split.folders[1:]:
        accept(folder, LLAMA_MODULES, max_lora_rank=8)
        model.load_adapter(folder, adapter_name=folder.name)
    model.base_model.set_adapter([folder.name for folder in split.folders])
    torch.testing.assert_close(logits(model), logits(trained), rtol=0, atol=1e-6)

    svd = delta.to_lora(tmp_path / "svd", base, rank=2, above="svd")
    merged = adapted(base, tmp_path / "svd").merge_and_unload()
    assert len(svd.errors) == 14
    for path, error in svd.errors.items():
        whole = (trained.get_submodule(path).weight - base.get_submodule(path).weight).detach()
        missing = (trained.get_submodule(path).weight - merged.get_submodule(path).weight).detach()
        assert float(missing.norm() / whole.norm()) == pytest.approx(error, rel=1e-3)
        assert float(torch.linalg.svdvals(whole)[2:].norm() / whole.norm()) == pytest.approx(error, rel=1e-3)
    assert "the largest relative error is" in str(svd)


def edited(base, **entries):
    """The delta of a copy of a base with these entries of these tensors changed."""
    model = copy.deepcopy(base)
    with torch.no_grad():
        for name, entry in entries.items():
            model.get_parameter(name.replace("__", "."))[entry] += 0.5
    return Delta.of(model, base=base)


def test_what_lora_cannot_hold_is_refused_by_name_or_dropped(tmp_path):
    base = llama(attention_bias=True)
    kept, lost = "model__layers__0__self_attn__q_proj__weight", ["model__embed_tokens__weight", "model__norm__weight"]
    delta = edited(base, **dict.fromkeys([kept, *lost, kept.replace("weight", "bias")], 0))
    with pytest.raises(ValueError, match=r"no place for 3 of 4 tensors; drop=True") as caught:
        delta.to_lora(tmp_path, base)
    for name in delta.keys() - {kept.replace("__", ".")}:
        assert f"  {name}, " in str(caught.value)
    assert not list(tmp_path.iterdir())
    for given in (base, base.state_dict()):
        export = delta.to_lora(tmp_path, given, drop=True)
        assert set(export.dropped) == delta.keys() - {kept.replace("__", ".")}
        assert all(f"left out: {name}" in str(export) for name in export.dropped)
        assert export.ranks == {kept.replace("__", ".").removesuffix(".weight"): 1}
        accept(tmp_path, LLAMA_MODULES, max_lora_rank=8)


def test_tied_weights_and_fused_experts_are_refused(tmp_path):
    base = llama(tie_word_embeddings=True)
    delta = edited(base, model__embed_tokens__weight=(0, 0))
    with pytest.raises(ValueError, match=r"embed_tokens\.weight, an embedding"):
        delta.to_lora(tmp_path, base)
    head = Delta({"lm_head.weight": delta["model.embed_tokens.weight"]})
    with pytest.raises(ValueError, match=r"lm_head\.weight, which is also model\.embed_tokens\.weight"):
        head.to_lora(tmp_path, base)
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1, max_position_embeddings=32,
    )  # fmt: skip
    mixtral = transformers.MixtralForCausalLM(config).eval()
    delta = edited(mixtral, model__layers__0__mlp__experts__gate_up_proj=(0, 0))
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj, 2x48x16, which is no weight of a Linear"):
        delta.to_lora(tmp_path, mixtral)


def test_a_new_head_is_saved_whole(tmp_path):
    torch.manual_seed(0)
    config = llama().config
    config.num_labels, config.pad_token_id = 3, 0
    base = transformers.LlamaForSequenceClassification(config).eval()
    trained, delta = tuned(base, gradsel.Columns(2), freeze=["*norm*", "*embed*"])
    export = delta.to_lora(tmp_path, base)
    assert export.saved == ["score"]
    torch.testing.assert_close(logits(adapted(base, tmp_path)), logits(trained), rtol=0, atol=1e-6)
    accept(tmp_path, LLAMA_MODULES, max_lora_rank=8)  # vLLM knows this module_to_save


def test_transposed_layers(tmp_path):
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    base = transformers.GPT2LMHeadModel(config).eval()
    frozen = {"freeze": ["*ln*", "*wte*", "*wpe*", "*bias"]}
    trained, delta = tuned(base, gradsel.PerNeuron(1, columns=3), **frozen)
    with pytest.raises(ValueError, match=r"may be stored as \[in, out\].*pass base= as a model"):
        delta.to_lora(tmp_path, base.state_dict())
    export = delta.to_lora(tmp_path, base)
    assert export.rank == 3
    torch.testing.assert_close(logits(adapted(base, tmp_path)), logits(trained), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"above": "clip"}, "above must be one of 'refuse', 'split', 'svd', got 'clip'"),
        ({"dtype": torch.int8}, "dtype must be a floating-point dtype, got torch.int8"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path):
    base = llama()
    _, delta = tuned(base, gradsel.Columns(2))
    with pytest.raises(ValueError, match=message):
        delta.to_lora(tmp_path / "out", base, **arguments)
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path, capsys):
    base = llama()
    trained, delta = tuned(base, gradsel.Columns(3))
    base.save_pretrained(tmp_path / "base")
    delta.save(tmp_path / "task.delta")
    run = ["delta", "lora", str(tmp_path / "task.delta"), str(tmp_path / "adapter"), "--base", str(tmp_path / "base")]
    assert cli.main([*run, "--rank", "2"]) == 1
    assert "need a rank above --rank 2" in capsys.readouterr().err
    assert cli.main([*run, "--dtype", "float32"]) == 0
    assert "LoRA of rank 3, 14 layers" in capsys.readouterr().out
    torch.testing.assert_close(logits(adapted(base, tmp_path / "adapter")), logits(trained), rtol=0, atol=1e-6)
