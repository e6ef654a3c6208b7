"""One training step of every method on the same model and batch: ``python -m benchmarks.training.train_step``.

In each round every method takes one step (zero_grad, forward, backward, optimizer) on its own copy of the model. The
order of the methods is drawn anew in every round, and each ratio is between medians of the same rounds. Memory is
measured, not derived: what autograd saves in a forward pass, what ``.grad`` and the optimizer's state hold after a
step, and the masks. Results go to one tidy file with a row for each size and method; rows of an earlier run with the
same key are replaced. ``python -m benchmarks.draw`` draws them.

Random weights have other gradients than trained ones. The models are therefore trained briefly on real data first (the
state is kept in the temporary directory for the next run), and selections are taken from gradients on other batches of
that data. ``checkpoint_bytes`` is the file that a user keeps for each task, head included: a ViT has 10 classes here,
so its head adds 31 kB; with 100 classes it would be 308 kB.
"""

from __future__ import annotations

import argparse
import copy
import functools
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import Adam, AdamW
from tqdm.auto import tqdm

import gradsel
from benchmarks.harness.environment import MACHINE, RESULTS, machine
from benchmarks.harness.results import load, merge
from benchmarks.training.cases import CASES, SMALL, Batch, Case, cross_entropy
from benchmarks.training.pictures import summary
from gradsel.experiments.cost.contenders import RATE, Loss
from gradsel.experiments.cost.contenders import Contender as TrainedModel
from gradsel.experiments.cost.timing import peak_recorded, percentiles, shuffled, time_calls

FIELDS = [
    "benchmark", "size", "method", "k", "trained", "step_p20_ms", "step_p50_ms", "step_p80_ms", "rounds",
    "ratio_to_full", "ratio_to_lora", "ratio_to_floor", "saved_bytes", "gradient_bytes", "optimizer_bytes",
    "mask_bytes", "peak_bytes", "trained_bytes", "checkpoint_bytes", "used_columns_percent", "weights_bytes",
    "peft", "transformers", *MACHINE,
]  # fmt: skip
KEY = ("benchmark", "size", "method", "k", "device", "threads")
WARM_UP = 2


# --- Methods: each prepares a copy of the model ------------------------------------------------------------------


@dataclass(kw_only=True)
class Contender(TrainedModel):
    """A model that is ready to be trained by one method.

    Attributes:
        masks: everything that holds the method's masks, indices and copies of original values.
        checkpoint_bytes: size of the file that a user keeps for each task.
    """

    loss: Loss = cross_entropy
    checkpoint_bytes: int
    masks: Any = None

    @property
    def trainable(self) -> list[nn.Parameter]:
        return gradsel.trainable_parameters(self.model)


Build = Callable[[Case, nn.Module], Contender]


def floor(case: Case, model: nn.Module) -> Contender:
    """Forward, and the gradient of every layer's input down to the first layers that ours trains, and nothing else."""
    model.requires_grad_(False)
    for name in case.entrances:
        model.get_submodule(name).register_forward_hook(lambda module, args, output: output.requires_grad_())
    return Contender(model=model, checkpoint_bytes=0)


def file_bytes(write: Callable[[Path], object]) -> int:
    """Size of the files that ``write`` puts into a folder."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def state_bytes(module: nn.Module) -> int:
    """Size of the file of a module's parameters and buffers."""
    state = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
    return file_bytes(lambda folder: save_file(state, folder / "state.safetensors"))


def delta_bytes(model: nn.Module, selection: gradsel.Selection) -> int:
    """Size of the file of a selection's values. ``model`` is not attached; a copy is."""
    attached = copy.deepcopy(model)
    gradsel.attach(attached, selection)
    return file_bytes(lambda folder: gradsel.save_delta(attached, folder / "delta.safetensors", selection=selection))


def full(case: Case, model: nn.Module) -> Contender:
    optimizer = AdamW(model.parameters(), RATE, fused=True)
    return Contender(model=model, checkpoint_bytes=state_bytes(model), optimizer=optimizer)


def linear_probe(case: Case, model: nn.Module) -> Contender:
    model.requires_grad_(False)
    head = model.get_submodule(case.head).requires_grad_(True)
    optimizer = AdamW(head.parameters(), RATE, fused=True)
    return Contender(model=model, checkpoint_bytes=state_bytes(head), optimizer=optimizer)


def adapter(config: Callable[..., peft.PeftConfig], **settings: Any) -> Build:
    """A method of PEFT, on every linear layer of the blocks."""

    def build(case: Case, model: nn.Module) -> Contender:
        saved = [case.head] if case.trains_head else None
        adapted = peft.get_peft_model(model, config(target_modules=case.layers, modules_to_save=saved, **settings))
        size = file_bytes(adapted.save_pretrained)
        indices = [getattr(module, "shira_indices", None) for module in adapted.modules()]
        optimizer = AdamW(gradsel.trainable_parameters(adapted), RATE, fused=True)
        return Contender(model=adapted, checkpoint_bytes=size, optimizer=optimizer, masks=indices)

    return build


def published(policy: Any) -> Build:
    """GPS as its published code trains: dense Adam on dense gradients that are multiplied by dense masks."""

    def build(case: Case, model: nn.Module) -> Contender:
        selection = case.select(model, policy)
        size = delta_bytes(model, selection)
        gradsel.freeze(model, selection)
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        masked = [(p, selection[name].to_dense().float()) for name, p in named if not selection[name].is_whole]

        def mask() -> None:
            for parameter, dense in masked:
                parameter.grad.mul_(dense)

        optimizer = Adam([parameter for _, parameter in named], RATE, fused=True)
        return Contender(
            model=model, checkpoint_bytes=size, optimizer=optimizer, after_backward=mask,
            masks=[dense for _, dense in masked], selection=selection,
        )  # fmt: skip

    return build


def ours(policy: Any, criterion: str = "gradient") -> Build:
    def build(case: Case, model: nn.Module) -> Contender:
        selection = case.select(model, policy, criterion)
        size = delta_bytes(model, selection)
        gradsel.attach(model, selection)
        optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(model), RATE)
        # Of every attached module its masks, indices and originals; of the model, the originals of whole parameters.
        kept = ("_gradsel_selected", "_gradsel_record")
        masks = [[vars(module).get(name) for name in kept] for module in model.modules()]
        return Contender(model=model, checkpoint_bytes=size, optimizer=optimizer, masks=masks, selection=selection)

    return build


PUBLISHED, OURS = "GPS as published", "ours"  # compared with each other before anything is timed
METHODS: dict[tuple[str, int], Build] = {
    ("floor", 0): floor,
    ("full fine-tuning", 0): full,
    ("linear probe", 0): linear_probe,
    ("LoRA", 8): adapter(peft.LoraConfig, r=8, lora_dropout=0.0),
    ("SHiRA", 1): adapter(peft.ShiraConfig, r=1, random_seed=0),
    (PUBLISHED, 1): published(gradsel.PerNeuron(1)),
    **{(OURS, k): ours(gradsel.PerNeuron(k)) for k in (1, 2, 5, 10)},
    ("ours, random", 1): ours(gradsel.PerNeuron(1), "random"),
    ("ours, rows", 3): ours(gradsel.Rows(3)),
    ("ours, columns", 3): ours(gradsel.Columns(3)),
}


# --- Measuring ---------------------------------------------------------------------------------------------------


def tensors(holder: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Every tensor in containers and plain objects, at any depth."""
    seen = set() if seen is None else seen
    if isinstance(holder, Tensor):
        yield holder
    elif id(holder) not in seen:
        seen.add(id(holder))
        parts = holder if isinstance(holder, (dict, list, tuple)) else getattr(holder, "__dict__", {})
        for part in parts.values() if isinstance(parts, dict) else parts:
            yield from tensors(part, seen)


def storages(held: Iterable[Tensor]) -> dict[int, int]:
    """Bytes by address of the memory that tensors keep alive: all of it, even if a view shows only a part."""
    parts: list[Tensor] = []
    for tensor in held:
        parts += [tensor._indices(), tensor._values()] if tensor.is_sparse else [tensor]
    return {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}


def pinned(held: Iterable[Tensor]) -> int:
    return sum(storages(held).values())


def saved_bytes(contender: Contender, batch: Batch) -> int:
    """What autograd keeps between forward and backward besides parameters, buffers, masks and the batch."""
    model = contender.model
    known = storages([*model.parameters(), *model.buffers(), *tensors(contender.masks), *batch])
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.detach())  # alive, so that no other tensor gets its address
        return kept[-1]

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        cross_entropy(model, batch)
    return sum(size for address, size in storages(kept).items() if address not in known)


def peak_bytes(contender: Contender, batch: Batch) -> int:
    """The most that torch allocates during a step, beyond what it had before; earlier gradients are freed first."""
    contender.model.zero_grad()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        contender.step(batch)
    peak = peak_recorded(profile.profiler.kineto_results)
    assert peak is not None
    return peak


def memory(contender: Contender, batch: Batch) -> dict[str, Any]:
    """The columns about memory. Called after a step, when gradients and states exist."""
    state = () if contender.optimizer is None else contender.optimizer.state.values()
    gradients = [p.grad for p in contender.trainable if p.grad is not None]
    return {
        "gradient_bytes": pinned(gradients),
        "optimizer_bytes": pinned(tensors(list(state))),
        "mask_bytes": pinned(tensors(contender.masks)),
        "saved_bytes": saved_bytes(contender, batch),
        "peak_bytes": peak_bytes(contender, batch),
        "trained_bytes": pinned(contender.trainable),
        "checkpoint_bytes": contender.checkpoint_bytes,
    }


def check(losses: dict[tuple[str, int], list[float]], where: str) -> None:
    """Raises SystemExit unless ours trains as the published way does: otherwise its speed would mean nothing."""
    for one, other in zip(losses[OURS, 1], losses[PUBLISHED, 1], strict=True):
        if not abs(one - other) <= 1e-5 * abs(other):
            sys.exit(f"{where}: losses of ours {losses[OURS, 1]} and as published {losses[PUBLISHED, 1]} differ")


def check_small(case: Case) -> None:
    """Three steps on a small model, at a learning rate that moves it."""
    model = case.pretrained()
    batches = list(case.batches(3, 3, case.samples))
    losses = {}
    for method in ((OURS, 1), (PUBLISHED, 1)):
        contender = METHODS[method](case, copy.deepcopy(model))
        contender.optimizer.param_groups[0]["lr"] = 1e-3
        losses[method] = [contender.step(batch).item() for batch in batches]
    check(losses, case.size)
    print(f"{case.size}: ours and as published agree, losses {', '.join(f'{x:.6f}' for x in losses[OURS, 1])}")


def measure(case: Case, rounds: int) -> list[dict[str, Any]]:
    """All methods on one model: the rows of the results."""
    model = case.pretrained()
    weights = pinned(model.parameters())
    (batch,) = case.batches(3, 1, case.samples)
    contenders = {method: build(case, copy.deepcopy(model)) for method, build in METHODS.items()}
    seconds: dict[tuple[str, int], list[float]] = {method: [] for method in contenders}
    losses: dict[tuple[str, int], list[float]] = {method: [] for method in contenders}
    orders = shuffled(contenders)
    for _ in tqdm(range(WARM_UP + rounds), desc=case.size, unit="round", leave=False):
        for method in next(orders):
            step = functools.partial(contenders[method].step, batch)
            seconds[method].append(time_calls(lambda step=step, own=losses[method]: own.append(step().item()))[0])
    check(losses, case.size)

    spread = {method: percentiles(times[WARM_UP:]) for method, times in seconds.items()}
    rows = []
    for (name, k), contender in contenders.items():
        p20, p50, p80 = spread[name, k]
        row = {"benchmark": "train-step", "size": case.size, "method": name, "k": k, **contender.facts()}
        row |= {f"step_p{p}_ms": f"{1000 * s:.1f}" for p, s in ((20, p20), (50, p50), (80, p80))}
        for column, other in (("full", ("full fine-tuning", 0)), ("lora", ("LoRA", 8)), ("floor", ("floor", 0))):
            row[f"ratio_to_{column}"] = f"{p50 / spread[other][1]:.3f}"
        row |= {"rounds": rounds, "weights_bytes": weights, **memory(contender, batch)}
        rows.append(row | {"peft": peft.__version__, "transformers": transformers.__version__, **machine()})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default=",".join(CASES), help="sizes, comma-separated (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="measured steps of every method (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS / "train_step-cpu.csv", help="the CSV file")
    args = parser.parse_args()
    unknown = set(args.only.split(",")) - set(CASES)
    if unknown:
        parser.error(f"--only knows {', '.join(CASES)}, not {', '.join(unknown)}")
    if args.rounds < 2:
        parser.error("--rounds must be at least 2, for percentiles")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or torch.profiler writes a line at every start and stop
    warnings.filterwarnings("ignore", module=r"peft|transformers")  # about what they do inside
    for case in SMALL:
        check_small(case)
    for name in args.only.split(","):
        rows = measure(CASES[name], args.rounds)
        merge(args.results, FIELDS, KEY, rows)
        print(f"\n{summary([row for row in load(args.results) if row['size'] == CASES[name].size])}")
    print(f"\n{args.results}")


if __name__ == "__main__":
    main()
