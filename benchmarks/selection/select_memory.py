"""Peak memory of selecting weights and of one training step: ``python -m benchmarks.selection.select_memory``.

The model is shaped like Llama-3.2-1B, with random bfloat16 weights; the GRFT paper calls GPS infeasible for it because
of the masks. Weights are selected at K = 1 in each memory mode, then the model is attached and trained for one step.
The peak is that of the whole process as Linux counts it (VmHWM, reset before each phase). Results go to
``benchmarks/results/select_memory-cpu.csv``; rows of an earlier run with the same key are replaced.

Streaming is held to this bound: weights + activations + the largest gradient. What a process needs before it has a
model is part of the row "weights"; activations are the rise of the peak in a forward pass that saves everything that
weight gradients need.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import gradsel
from benchmarks.harness.environment import MACHINE, RESULTS, machine
from benchmarks.harness.results import merge
from gradsel.papers.counting import MODELS

FIELDS = ["benchmark", "model", "tokens", "phase", "peak_bytes", "seconds", "note", "transformers", *MACHINE]
KEY = ("benchmark", "model", "tokens", "phase", "device", "threads")
Batch = tuple[Tensor, Tensor]


def peak_of(run: Callable[[], Any]) -> tuple[Any, int, float]:
    """What ``run`` returns, the peak of the process's resident memory meanwhile in bytes, and the seconds it took."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - start
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return result, int(status["VmHWM"].split()[0]) * 1024, seconds


def build(small: bool) -> nn.Module:
    """Random weights, created in bfloat16, because float32 ones would take twice the memory."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = small_llama() if small else MODELS["llama-3.2-1b"](2)
    finally:
        torch.set_default_dtype(before)
    model.config.pad_token_id = 0
    return model.eval()


def small_llama() -> nn.Module:
    return transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(
            hidden_size=256, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=4, vocab_size=1000
        )
    )


def features(model: Any, tokens: Tensor) -> Tensor:
    """The last token's features, [batch, dim]."""
    return model.model(tokens).last_hidden_state[:, -1]


def measure(small: bool, samples: int, length: int, group_gb: float) -> list[dict[str, Any]]:
    """One row for each phase."""
    rows: list[dict[str, Any]] = []
    name = "Llama-3.2-1B" if not small else "Llama, 2 layers of 256"

    def phase(what: str, run: Callable[[], Any], note: Callable[[Any], str] = lambda result: "") -> Any:
        result, peak, seconds = peak_of(run)
        rows.append(
            {
                "benchmark": "select-memory", "model": name, "tokens": samples * length, "phase": what,
                "peak_bytes": peak, "seconds": f"{seconds:.1f}", "note": note(result),
                "transformers": transformers.__version__, **machine(),
            }
        )  # fmt: skip
        print(f"{what:<28}{peak / 1e9:8.2f} GB {seconds:8.1f} s  {rows[-1]['note']}", flush=True)
        return result

    torch.manual_seed(0)
    model = phase(
        "weights", lambda: build(small), lambda m: f"{sum(p.nbytes for p in m.parameters())} bytes of weights"
    )
    vocabulary = model.config.vocab_size
    generator = torch.Generator().manual_seed(0)

    def batch() -> Batch:
        return torch.randint(1, vocabulary, (samples, length), generator=generator), torch.arange(samples) % 2

    data = [batch(), batch()]
    loss = gradsel.contrastive(features)
    ranked = [model.get_parameter(key) for key in gradsel.ranked_sizes(model)]
    largest = max(parameter.nbytes for parameter in ranked)

    def forward() -> None:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in ranked:
            parameter.requires_grad_(True)
        loss(model, data[0])

    phase("forward", forward, lambda _: f"{largest} bytes in the largest gradient")

    def choose(**arguments: Any) -> gradsel.Selection:
        return gradsel.select(model, policy=gradsel.PerNeuron(1), loss=loss, **arguments)

    def note(selection: gradsel.Selection) -> str:
        return f"{selection.notes['memory']}; {selection.trainable_count()} trained"

    selection = phase("select, streaming", lambda: choose(batches=data[:1], memory="streaming"), note)
    limit = int(group_gb * 1e9)
    phase("select, grouped", lambda: choose(batches=data, max_gradient_bytes=limit), note)
    phase("select, full", lambda: choose(batches=data, memory="full"), note)

    def train() -> float:
        gradsel.attach(model, selection)
        optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(model), lr=1e-3)
        value = gradsel.cross_entropy(model, data[0])
        value.backward()
        optimizer.step()
        return value.item()

    phase("attach and train a step", train, lambda value: f"loss {value:.4f}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=8, help="samples of a batch (default: %(default)s)")
    parser.add_argument("--length", type=int, default=64, help="tokens of a sample (default: %(default)s)")
    parser.add_argument(
        "--group",
        type=float,
        default=1.0,
        metavar="GB",
        help="limit of grouped mode (default: %(default)s)",
    )
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the program; writes nothing")
    arguments = parser.parse_args()
    if not Path("/proc/self/clear_refs").exists():
        sys.exit("peak memory is measured through /proc, which this system does not have")
    rows = measure(arguments.small, arguments.samples, arguments.length, 0.004 if arguments.small else arguments.group)
    peak = {row["phase"]: row["peak_bytes"] for row in rows}
    largest = int(rows[1]["note"].split()[0])
    bound = peak["forward"] + largest
    print(f"streaming / (weights + activations + largest gradient): {peak['select, streaming'] / bound:.3f}")
    if not arguments.small:
        merge(RESULTS / "select_memory-cpu.csv", FIELDS, KEY, rows)


if __name__ == "__main__":
    main()
