"""Sparse adapters of PEFT with and without ``gradsel.peft.accelerate``: ``python -m benchmarks.training.peft_layers``.

One block of a model, forward and backward, without an optimizer, in interleaved rounds. Saved bytes are those that
forward keeps for backward, without parameters and the input. Results go to
``benchmarks/results/peft_layers-cpu.csv``; rows of an earlier run with the same key are replaced.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

from benchmarks.harness.environment import RESULTS, machine
from benchmarks.harness.results import merge
from benchmarks.harness.timing import interleaved
from gradsel.experiments.cost.timing import percentiles
from gradsel.peft import accelerate

CONFIGS: dict[str, Callable[[], peft.PeftConfig]] = {
    "SHiRA, r = 8": lambda: peft.ShiraConfig(r=8, target_modules="all-linear", random_seed=0),
    "Super-Tuning, 1 %": lambda: peft.SupertuningConfig(sparsity=0.99, target_modules="all-linear"),
}
PEFT, OURS = "PEFT", "accelerated"
FIELDS = [
    "size", "adapter", "provider", "p20_ms", "p50_ms", "p80_ms", "rounds", "ratio", "saved_bytes", "trained", "peft",
    "transformers", *machine(),
]  # fmt: skip
KEY = ("size", "adapter", "provider", "device", "threads")


class Blocks(nn.Module):
    """A model of transformers from the inputs of its first block to the outputs of its last."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.model(inputs_embeds=x).last_hidden_state
        return output


class Encoder(nn.Module):
    """The blocks of a ViT."""

    def __init__(self, config: transformers.ViTConfig) -> None:
        super().__init__()
        self.layers = transformers.ViTModel(config, add_pooling_layer=False).layers

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def vit(**changes: int) -> nn.Module:
    """One block of ViT-B/16."""
    return Encoder(transformers.ViTConfig(num_hidden_layers=1, **changes))


def llama(**changes: int) -> nn.Module:
    """One block of Llama-3.2-1B; the embedding, which is not used, is small."""
    settings = {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 1, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 8, **changes,
    }  # fmt: skip
    return Blocks(transformers.LlamaModel(transformers.LlamaConfig(**settings)))


#: The model, and batch, tokens and width of its input.
Case = tuple[Callable[[], nn.Module], tuple[int, int, int]]
CASES: dict[str, Case] = {
    "ViT-B/16, 1 block, batch 4": (vit, (4, 197, 768)),
    "Llama-3.2-1B, 1 block, 256 tokens": (llama, (1, 256, 2048)),
}
SMALL: dict[str, Case] = {
    "small ViT": (lambda: vit(hidden_size=32, intermediate_size=64, num_attention_heads=2), (2, 5, 32)),
    "small Llama": (
        lambda: llama(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2),
        (1, 8, 32),
    ),
}


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of what forward keeps for backward."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()} | {x.untyped_storage().data_ptr()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not tensor.is_sparse and tensor.untyped_storage().data_ptr() not in known:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x)  # held, so that no memory is used twice
    total = sum(found.values())
    del output
    return total


def rows(size: str, case: Case, adapter: str, rounds: int) -> list[dict[str, Any]]:
    """One row for PEFT's own layers, and one for ours; the ratio is the median of those of all rounds."""
    make, shape = case
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    theirs = peft.get_peft_model(make(), CONFIGS[adapter]())
    models = {PEFT: theirs, OURS: accelerate(copy.deepcopy(theirs))}
    steps = {name: (lambda model=model: lambda: model(x).sum().backward()) for name, model in models.items()}
    seconds = interleaved(steps, rounds)
    found = []
    for name, values in seconds.items():
        p20, p50, p80 = (f"{1e3 * value:.2f}" for value in percentiles(values))
        ratios = [one / other for one, other in zip(values, seconds[PEFT], strict=True)]
        trained = sum(p.numel() for p in models[name].parameters() if p.requires_grad)
        found.append(
            {
                "size": size, "adapter": adapter, "provider": name, "p20_ms": p20, "p50_ms": p50, "p80_ms": p80,
                "rounds": rounds, "ratio": f"{percentiles(ratios)[1]:.3f}", "saved_bytes": saved_bytes(models[name], x),
                "trained": trained, "peft": peft.__version__, "transformers": transformers.__version__, **machine(),
            }
        )  # fmt: skip
        print(f"{size:<36}{adapter:<20}{name:<14}{float(p50):9.1f} ms {found[-1]['ratio']:>8}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="rounds of each (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="tiny models, to try the program; writes nothing")
    arguments = parser.parse_args()
    measured: list[dict[str, Any]] = []
    for size, case in (SMALL if arguments.small else CASES).items():
        for adapter in CONFIGS:
            measured += rows(size, case, adapter, arguments.rounds)
    if not arguments.small:
        merge(RESULTS / "peft_layers-cpu.csv", FIELDS, KEY, measured)


if __name__ == "__main__":
    main()
