"""Full fine-tuning that moves few weights (GPS, Eq. 3 and 4), and whether gradients foretell which."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_callback import TrainerCallback

from gradsel.experiments.papers.selections import Measured, batches_of
from gradsel.experiments.working import run_or_continue
from gradsel.methods.ranked import loss_for
from gradsel.parameters.names import has_part, named_parameters, strings
from gradsel.parameters.rules import parameter_rules
from gradsel.ranking.policies import PerNeuron
from gradsel.ranking.selecting import select
from gradsel.training.config import Config
from gradsel.training.tasks import task_of
from gradsel.training.using import loaded_result

#: The most entries of a matrix that ranks are correlated on.
_ENTRIES = 200_000


class SparsePull(TrainerCallback):
    """After every step, moves weights back to where training began by ``rate * pull``, but not beyond.

    This is the proximal step of an L1 penalty, the usual stand-in for one that counts what moves. What the optimizer
    moves by less stays where it was, to the bit.

    Args:
        base: the pre-trained values by name; others are not pulled.
        pull: the strength of the penalty, lambda.
    """

    def __init__(self, base: Mapping[str, Tensor], pull: float) -> None:
        self._base, self._pull = base, pull

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._pull:
            return
        step = kwargs["optimizer"].param_groups[0]["lr"] * self._pull
        for name, parameter in named_parameters(kwargs["model"]).items():
            if name in self._base:
                base = self._base[name]
                change = parameter - base
                parameter.copy_(base + change.sign() * (change.abs() - step).clamp_(min=0))


def regularized(config: Config, pull: float) -> Measured:
    """Trains all weights with a pull that keeps most of them (GPS, Eq. 4), and compares changes with gradients.

    Args:
        pull: see :class:`SparsePull`.

    Returns:
        Besides the accuracy, over the ranked matrices: ``moved``, the percentage of weights that changed;
        ``agreement``, the percentage of the weight of each neuron that changed most which also has the largest
        gradient, with ``chance`` that of a random guess; ``rank correlation`` of both magnitudes (Spearman), the mean
        over matrices.
    """
    loaded, batches, views = batches_of(config)
    before = {name: tensor.detach().clone() for name, tensor in named_parameters(loaded.model).items()}
    held = {name: tensor for name, tensor in before.items() if not has_part(name, strings(loaded.head))}
    results = run_or_continue(config, callbacks=[SparsePull(held, pull)])
    gradients: list[Tensor] = []

    def kept(weight: Tensor, grad: Tensor) -> Tensor:
        gradients.append(grad.clone())
        return grad

    loss = loss_for(loaded.model, "contrastive", views)
    ranked = parameter_rules(loaded.model, **loaded.rules)
    rules = {name: rule for name, rule in ranked.items() if rule.action == "rank"}
    # With all gradients held, they are ranked in the order of the rules.
    select(loaded.model, batches, loss, PerNeuron(1), kept, memory="full", progress=False, **loaded.rules)
    task, folder = task_of(config), Path(config.output.folder)
    data = task.read(config)
    model, _, _ = loaded_result(folder, config, data.classes, data.kind)
    after = named_parameters(model)
    moved = total = agreed = rows = 0
    chances, correlations = [], []
    for (name, rule), gradient in zip(rules.items(), gradients, strict=True):
        change = rule.view.of((after[name].detach() - before[name]).abs())
        change, score = change.reshape(gradient.shape), gradient.abs()
        moved, total = moved + int(change.count_nonzero()), total + change.numel()
        active = change.amax(1) > 0  # of a neuron that did not move, nothing moved most
        agreed += int((change.argmax(1) == score.argmax(1))[active].sum())
        rows += int(active.sum())
        chances.append((int(active.sum()), 100 / change.shape[1]))
        correlations.append(_rank_correlation(change.flatten(), score.flatten()))
    known = [value for value in correlations if value is not None]
    values = {
        "top1": results["metrics"]["top1"],
        "moved": 100 * moved / total,
        "agreement": 100 * agreed / max(rows, 1),
        "chance": sum(count * chance for count, chance in chances) / max(rows, 1),
    }
    if known:
        values["rank correlation"] = statistics.fmean(known)
    return Measured(values, results)


def _rank_correlation(first: Tensor, second: Tensor) -> float | None:
    """Spearman's, on some of the entries of large tensors; None if one of them is constant."""
    from scipy.stats import spearmanr

    step = max(1, first.numel() // _ENTRIES)
    one, other = first[::step].float().cpu(), second[::step].float().cpu()
    if one.min() == one.max() or other.min() == other.max():
        return None
    return float(spearmanr(one.numpy(), other.numpy()).statistic)
