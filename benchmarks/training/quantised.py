"""Training on a 4-bit base against QLoRA: ``python -m benchmarks.training.quantised``.

Models are shaped like Llama-3.2-1B, with random weights in nf4 with nested scales, computed in bfloat16. Selected
entries (K of every neuron of all linear layers, by MaskedAdamW) against PEFT's LoRA of rank 8 on the same layers (by
torch's AdamW), without activation checkpointing.

- ``memory``: the whole model, in a new process for each method: selected by streaming, attached or wrapped, and trained
  for two steps. The peak is that of the process as Linux counts it (VmHWM, reset before each phase), its libraries and
  the model included.
- ``step``: four blocks, with the vocabulary of 4,096 that a loss needs, in one process; methods take steps in turn.
- ``adding``: what the differences of one layer cost in a forward of 512 tokens: added to the dense weight that is made
  for the product anyway, or as a sparse product, which has to read and write the output at least once. That bound is
  measured, and so are our product and torch's of a sparse matrix in rows (CSR), which works in float32.
- ``inference``: one token through one layer in ``eval()`` mode without gradients: the library's own layer, and the
  attached one, in which the library multiplies and the sparse product is added, or which makes the weight dense, as it
  does in training.

Results go to ``benchmarks/results/quantised-cpu.csv``; rows of an earlier run with the same key are replaced.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import bitsandbytes
import peft
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import gradsel
import gradsel_kernels as gk
from benchmarks.harness.environment import MACHINE, RESULTS, ROOT, machine
from benchmarks.harness.results import merge
from benchmarks.harness.timing import interleaved
from benchmarks.selection.select_memory import peak_of
from gradsel.experiments.cost.timing import percentiles
from gradsel.masks import PerRow
from gradsel.quantised import quantised_weight

FIELDS = [
    "part", "model", "tokens", "provider", "phase", "p20_ms", "p50_ms", "p80_ms", "rounds", "peak_bytes", "trained",
    "peft", "bitsandbytes", *MACHINE,
]  # fmt: skip
KEY = ("part", "model", "tokens", "provider", "phase", "device", "threads")
WHOLE = "Llama-3.2-1B in nf4"
K1, K8, LORA = "selected, K = 1", "selected, K = 8", "QLoRA, r = 8"
PREPARED = "QLoRA, r = 8, prepared"
#: Weights of one block.
LAYERS = ((2048, 2048), (8192, 2048), (2048, 8192))


def llama(blocks: int = 16, vocabulary: int = 128256, hidden: int = 2048) -> nn.Module:
    """A model in nf4, made layer by layer: it never is in memory in 16 bits."""
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=blocks, num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256), vocab_size=vocabulary, tie_word_embeddings=True, use_cache=False,
        attn_implementation="sdpa",
    )  # fmt: skip
    with torch.device("meta"):
        model: Any = transformers.LlamaForCausalLM(config)
    for module in list(model.model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, _nf4(child.in_features, child.out_features))
            elif isinstance(child, nn.Embedding):
                weight = torch.empty(child.weight.shape, dtype=torch.bfloat16).normal_(std=0.02)
                child.weight = nn.Parameter(weight)
            elif type(child).__name__ == "LlamaRMSNorm":
                child.weight = nn.Parameter(torch.ones(child.weight.shape, dtype=torch.bfloat16))
    model.lm_head.weight = model.model.embed_tokens.weight
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.is_loaded_in_4bit = True  # PEFT asks
    return model.train()


def _nf4(inputs: int, outputs: int) -> nn.Module:
    layer = bitsandbytes.nn.Linear4bit(1, 1, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16)
    layer.in_features, layer.out_features = inputs, outputs
    weight = torch.empty(outputs, inputs, dtype=torch.bfloat16).normal_(std=0.02)
    layer.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=layer)
    return layer.to("cpu")


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


def batch(model: Any, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, model.config.vocab_size, (1, tokens), generator=generator)


def select(model: nn.Module, ids: Tensor, k: int) -> gradsel.Selection:
    return gradsel.select(model, [ids], loss_of, gradsel.PerNeuron(k), memory="streaming", progress=False)


def lora(model: Any, prepared: bool = False) -> nn.Module:
    """PEFT's adapters on all linear layers; prepared as its documentation says, all other weights are float32."""
    if prepared:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets))


def optimizer(model: nn.Module, provider: str) -> torch.optim.Optimizer:
    kind = gradsel.MaskedAdamW if provider in (K1, K8) else torch.optim.AdamW
    return kind(gradsel.trainable_parameters(model), lr=1e-5)


def step(model: nn.Module, steps: torch.optim.Optimizer, ids: Tensor) -> None:
    steps.zero_grad(set_to_none=True)
    loss_of(model, ids).backward()
    steps.step()


def trained(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in gradsel.trainable_parameters(model))


# --- Parts -------------------------------------------------------------------------------------------------------


def memory_of(provider: str, tokens: int, small: bool) -> list[dict[str, Any]]:
    """The phases of one method; to be run in a process of its own."""
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []

    def phase(name: str, run: Callable[[], Any]) -> Any:
        result, peak, seconds = peak_of(run)
        rows.append({"phase": name, "peak_bytes": peak, "p50_ms": f"{1e3 * seconds:.0f}", "rounds": 1})
        return result

    model = phase("load", lambda: llama(2, 1000, 256) if small else llama())
    ids = batch(model, tokens)
    if provider in (K1, K8):
        selection = phase("select", lambda: select(model, ids, 1 if provider == K1 else 8))
        gradsel.attach(model, selection)
    else:
        model = phase("wrap", lambda: lora(model, provider == PREPARED))
    steps = optimizer(model, provider)
    phase("train", lambda: [step(model, steps, ids) for _ in range(2)])
    for row in rows:
        row["trained"] = trained(model)
    return rows


def memory(tokens: int, small: bool) -> list[dict[str, Any]]:
    rows = []
    for provider in (K1, LORA, PREPARED):
        command = [sys.executable, "-m", __spec__.name, "--of", provider, "--tokens", str(tokens)]
        out = subprocess.run([*command, *(["--small"] if small else [])], stdout=subprocess.PIPE, check=True, cwd=ROOT)
        for row in json.loads(out.stdout.splitlines()[-1]):
            rows.append({"part": "memory", "model": "small" if small else WHOLE, "provider": provider, **row})
            print(f"{provider:<26}{row['phase']:<8}{row['peak_bytes'] / 1e9:6.2f} GB {row['p50_ms']:>8} ms", flush=True)
    return [{**row, "tokens": tokens} for row in rows]


def times(tokens: int, rounds: int, small: bool) -> list[dict[str, Any]]:
    """Steps of all methods in turn."""
    shape: Mapping[str, int] = (
        {"blocks": 2, "vocabulary": 100, "hidden": 256} if small else {"blocks": 4, "vocabulary": 4096}
    )
    made = {}
    for provider in (K1, K8, LORA):
        torch.manual_seed(0)
        model = llama(**shape)
        ids = batch(model, tokens)
        if provider == LORA:
            model = lora(model)
        else:
            gradsel.attach(model, select(model, ids, 1 if provider == K1 else 8))
        made[provider] = model, optimizer(model, provider), ids
    seconds = interleaved({each: (lambda each=each: partial(step, *made[each])) for each in made}, rounds)
    name = f"{shape['blocks']} blocks of Llama-3.2-1B in nf4" if not small else "small"
    return [
        {"part": "step", "model": name, "tokens": tokens, "provider": provider, "phase": "train",
         "trained": trained(made[provider][0]), **_percentiles(taken)}
        for provider, taken in seconds.items()
    ]  # fmt: skip


def _percentiles(seconds: list[float]) -> dict[str, Any]:
    p20, p50, p80 = percentiles(seconds)
    return {"p20_ms": f"{1e3 * p20:.4g}", "p50_ms": f"{1e3 * p50:.4g}", "p80_ms": f"{1e3 * p80:.4g}",
            "rounds": len(seconds)}  # fmt: skip


def adding(rounds: int, small: bool) -> list[dict[str, Any]]:
    """What the differences of one layer add to its forward, in two ways, beside what the layer takes anyway."""
    rows = []
    tokens = 512
    for outputs, inputs in LAYERS[:1] if small else LAYERS:
        torch.manual_seed(0)
        layer = _nf4(inputs, outputs)
        weight = quantised_weight(layer)
        assert weight is not None
        x = torch.randn(tokens, inputs, dtype=torch.bfloat16)
        transposed = x.float().t().contiguous()

        def densely(weight: Any = weight) -> Tensor:
            return weight.dense(torch.bfloat16)

        def product(weight: Any = weight, x: Tensor = x) -> Tensor:
            return F.linear(x, weight.dense(torch.bfloat16))

        # What comes before, untimed, and what is timed: both find in the caches what they would find in a forward.
        contenders: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
            "dequantise": (lambda: None, lambda _, densely=densely: densely()),
            "matrix product": (densely, lambda dense, x=x: F.linear(x, dense)),
            "read and write the output": (product, lambda output: output.mul_(1.0)),
        }
        for k in (1, 8):
            cols = torch.rand(outputs, inputs).topk(k).indices.sort(1).values.int()
            mask, values = PerRow(cols, (outputs, inputs)), torch.randn(outputs, k)
            sparse = torch.sparse_csr_tensor(
                torch.arange(0, outputs * k + 1, k), cols.long().view(-1), values.view(-1), (outputs, inputs)
            )
            contenders[f"add to the dense weight, K = {k}"] = (
                densely,
                lambda dense, mask=mask, values=values: mask.scatter_(dense, mask.gather(dense) + values),
            )
            contenders[f"sparse product, K = {k}"] = (
                product,
                lambda output, x=x, cols=cols, values=values: gk.selected_addmm_(output, x, cols, values),
            )
            contenders[f"sparse product (CSR), K = {k}"] = (
                product,
                lambda _, sparse=sparse, transposed=transposed: torch.mm(sparse, transposed),
            )
        seconds = interleaved(
            {
                name: (lambda before=before, run=run: partial(run, before()))
                for name, (before, run) in contenders.items()
            },
            rounds,
        )
        rows += [
            {"part": "adding", "model": f"{outputs} x {inputs}", "tokens": tokens, "provider": name, "phase": "forward",
             **_percentiles(taken)}
            for name, taken in seconds.items()
        ]  # fmt: skip
    return rows


def _layers(inputs: int, outputs: int) -> dict[str, Callable[[], nn.Module]]:
    """Layers with random weights by the names of their formats."""

    def dense() -> nn.Linear:
        return nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16)

    def of_torchao() -> nn.Module:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        layer = dense()
        quantize_(layer, Int8WeightOnlyConfig())
        return layer

    def of_quanto() -> nn.Module:
        from optimum.quanto import QLinear, qint8

        layer = QLinear.from_module(dense(), weights=qint8)
        layer.freeze()
        return layer

    return {
        "nf4, bitsandbytes": lambda: _nf4(inputs, outputs),
        "int8, bitsandbytes": lambda: bitsandbytes.nn.Linear8bitLt(
            inputs, outputs, bias=False, has_fp16_weights=False
        ).to("cpu"),
        "int8, torchao": of_torchao,
        "int8, quanto": of_quanto,
    }


def inference(rounds: int, small: bool) -> list[dict[str, Any]]:
    """One token through one layer, in the library's own layer and in attached ones."""
    outputs, inputs = (256, 256) if small else LAYERS[1]
    x = torch.randn(1, inputs, dtype=torch.bfloat16)
    rows = []
    for name, make in _layers(inputs, outputs).items():
        made = {"the library's layer": (nn.Sequential(make()), False)}
        for k in (1, 8):
            model = nn.Sequential(make())
            selection = gradsel.select(model, [x], lambda model, x: model(x).float().sum(), gradsel.PerNeuron(k))
            gradsel.attach(model, selection)
            made[f"attached, K = {k}"] = model, False
        made["attached, K = 1, as in training"] = made["attached, K = 1"][0], True

        def maker(model: nn.Module, training: bool) -> Callable[[], Any]:
            return partial(model.train(training), x)

        with torch.no_grad():
            seconds = interleaved({each: partial(maker, *made[each]) for each in made}, rounds, warm_up=2)
        rows += [
            {"part": "inference", "model": f"{name}, {outputs} x {inputs}", "tokens": 1, "provider": provider,
             "phase": "forward", **_percentiles(taken)}
            for provider, taken in seconds.items()
        ]  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="memory, step, adding, inference; default: all")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="tiny models; results are only printed")
    parser.add_argument("--of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.of:
        print(json.dumps(memory_of(arguments.of, arguments.tokens, arguments.small)))
        return
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "memory": lambda: memory(arguments.tokens, arguments.small),
        "step": lambda: times(arguments.tokens, arguments.rounds, arguments.small),
        "adding": lambda: adding(4 * arguments.rounds, arguments.small),
        "inference": lambda: inference(4 * arguments.rounds, arguments.small),
    }
    if unknown := set(arguments.parts) - parts.keys():
        parser.error(f"unknown parts {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
    versions = {"peft": peft.__version__, "bitsandbytes": bitsandbytes.__version__}
    for part in arguments.parts or parts:
        rows = [{**dict.fromkeys(FIELDS, ""), **row, **versions, **machine()} for row in parts[part]()]
        if part != "memory":
            for row in rows:
                print(f"{row['model']:<34}{row['provider']:<34}{row['p50_ms']:>9} ms", flush=True)
        if not arguments.small:
            merge(RESULTS / "quantised-cpu.csv", FIELDS, KEY, rows)


if __name__ == "__main__":
    main()
