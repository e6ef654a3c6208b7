"""A language model that transformers loads in nf4: selected, attached, trained, its delta on the original, merged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gradsel

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

IDS = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small Llama in bfloat16."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, pad_token_id=0,
    )  # fmt: skip
    folder: Path = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


def in_nf4(folder: Path) -> nn.Module:
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, device_map={"": "cpu"}
    )
    return model.train()


def attached(folder: Path) -> tuple[nn.Module, gradsel.Selection]:
    model = in_nf4(folder)
    selection = gradsel.select(model, [IDS], loss, gradsel.PerNeuron(1), memory="streaming")
    gradsel.attach(model, selection)
    return model, selection


def test_from_loading_to_a_merged_checkpoint(original: Path, tmp_path: Path) -> None:
    model, selection = attached(original)
    assert all(mask.nnz for name, mask in selection.items() if name.endswith("_proj.weight"))
    steps = gradsel.MaskedAdamW(gradsel.trainable_parameters(model), lr=3e-3)
    losses = []
    for _ in range(4):
        value = loss(model, IDS)
        value.backward()
        steps.step()
        steps.zero_grad()
        losses.append(float(value))
    assert losses[-1] < losses[0]
    gradsel.save_delta(model, tmp_path / "task.delta", selection=selection)
    trained = float(loss(model, IDS))

    dense = transformers.LlamaForCausalLM.from_pretrained(original)
    before = float(loss(dense, IDS))
    with gradsel.Delta.load(tmp_path / "task.delta").applied(dense):
        assert float(loss(dense, IDS)) < before

    report = gradsel.merge(model, torch.bfloat16)
    assert report.error < 0.1
    model.save_pretrained(tmp_path / "merged")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(loaded.model.layers[0].mlp.up_proj) is nn.Linear
    assert float(loss(loaded, IDS)) == pytest.approx(trained, abs=5e-3)


def test_a_model_that_has_not_been_trained_is_exported(original: Path, tmp_path: Path) -> None:
    model, _ = attached(original)
    gradsel.export(in_nf4(original), tmp_path / "base", max_shard_size="20KB")
    gradsel.export(model, tmp_path / "attached", max_shard_size="20KB")
    files = sorted(file.name for file in (tmp_path / "base").iterdir())
    assert "model.safetensors.index.json" in files
    assert files == sorted(file.name for file in (tmp_path / "attached").iterdir())
    for file in files:
        assert (tmp_path / "attached" / file).read_bytes() == (tmp_path / "base" / file).read_bytes(), file


def test_in_the_trainer(original: Path, tmp_path: Path) -> None:
    model, _ = attached(original)
    data = [{"input_ids": ids, "labels": ids} for ids in IDS]

    def trainer() -> transformers.Trainer:
        arguments = transformers.TrainingArguments(
            tmp_path / "run", max_steps=2, save_strategy="no", report_to=[], use_cpu=True, learning_rate=1e-2
        )
        return transformers.Trainer(model, arguments, train_dataset=data)

    with pytest.raises(ValueError, match="purely quantized"):
        trainer()
    model.is_quantized = False  # as docs/quantised.md says
    trainer().train()
    values = model.model.layers[0].mlp.up_proj.weight_values
    assert bool(values.any())
