"""select(): one pass over the data, and from its gradients a mask for every parameter."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from gradsel.criteria import Criterion, Score, criterion_of
from gradsel.masks import Frozen, Mask, Whole
from gradsel.policies import PerNeuron, Policy
from gradsel.rules import HEAD, parameter_rules, strip_wrappers
from gradsel.selection import Selection


def select(
    model: nn.Module,
    batches: Iterable[Any] | None,
    loss: Callable[[Any, Any], Tensor] | None,
    policy: Policy = PerNeuron(1),
    criterion: str | Criterion | Score = "gradient",
    *,
    head: Iterable[str] = HEAD,
    rank: Iterable[str] = (),
    whole: Iterable[str] = (),
    freeze: Iterable[str] = (),
    progress: bool | None = None,
) -> Selection:
    """Chooses the entries to train, from the gradients of one pass over ``batches``.

    By default the gradient of every ranked parameter is summed over all batches with its sign, and the magnitude is
    taken once, at the end (GPS, section 3.2). Ties go to the lowest column.

    Args:
        model: run as it is: mode, autocast and device are the caller's. Gradients, ``requires_grad`` flags, buffers
            and torch's random number generators (CPU and CUDA) are given back as they were. Parameters are known by
            their names without the prefixes of DistributedDataParallel and torch.compile.
        batches: anything to iterate over, once. None for a criterion that needs no gradient.
        loss: ``loss(model, batch)`` returns the scalar to differentiate, for example supervised contrastive loss on
            features: ``lambda model, batch: SupConLoss()(model.forward_features(batch[0]), batch[1])``.
        policy: how many entries of what: ``PerNeuron(3)``, ``Rows(3)`` or ``Columns(3)``.
        criterion: what is ranked by its magnitude: ``"gradient"``, the sum over batches; ``"absolute"``, the sum of
            magnitudes; ``"fisher"``, the sum of squares (the empirical Fisher information, batch by batch); ``"snip"``,
            weight times gradient (Lee et al. 2019); ``"magnitude"``, the weight; ``"random"``; or a function of the
            neuron views ``(weight, grad) -> score``.
        head, rank, whole, freeze: what is ranked, trained whole or frozen: see :func:`gradsel.rules.parameter_rules`.
        progress: show a progress bar; None: on a terminal only.

    Returns:
        A mask for every parameter.

    Raises:
        ValueError: no batches; a gradient that is not finite (the parameter is named); a parameter named in ``rank``
            that gets no gradient; a pattern that matches nothing.
    """
    chosen = criterion_of(criterion)
    rules = parameter_rules(model, head=head, rank=rank, whole=whole, freeze=freeze)
    parameters = {strip_wrappers(name): parameter for name, parameter in model.named_parameters()}
    chosen.reset()
    ranked = {name: parameters[name] for name, rule in rules.items() if rule.action == "rank"}
    grads: dict[str, Tensor] = {}
    count = 0
    if chosen.needs_gradient and ranked:
        if batches is None or loss is None:
            raise ValueError(f"criterion {chosen.name!r} needs gradients: pass batches and loss")
        with _kept(model):
            grads, count = _accumulate(model, ranked, batches, loss, chosen.each_batch, progress)

    ranking = policy.start(
        {name: rule.view.shape(parameters[name].shape) for name, rule in rules.items() if rule.action == "rank"}
    )
    frozen: dict[str, Mask] = {}
    zero_rows: dict[str, int] = {}
    for name in tqdm(ranked, desc="ranking", unit="tensor", disable=_quiet(progress), leave=False):
        rule, parameter = rules[name], parameters[name]
        shape = tuple(parameter.shape)
        if chosen.needs_gradient and name not in grads:
            if rule.named:
                raise ValueError(f"{name} was named to be ranked, but got no gradient: the loss does not depend on it")
            frozen[name] = Frozen(shape, "no gradient")
            continue
        grad = grads.pop(name, None)  # freed as soon as it has been ranked
        grad = None if grad is None else rule.view.of(grad)
        with torch.no_grad():
            score = chosen.score(rule.view.of(parameter.detach()), grad)
        ranking.add(name, score, shape, rule.view, chosen.squared)
        if empty := int((score == 0).all(dim=1).sum()) if score.numel() else 0:
            zero_rows[name] = empty
    found = {**ranking.finish(), **frozen}
    masks: dict[str, Mask] = {}
    for name, rule in rules.items():
        shape = tuple(parameters[name].shape)
        masks[name] = (
            found[name]
            if rule.action == "rank"
            else Whole(shape)
            if rule.action == "whole"
            else Frozen(shape, rule.reason)
        )
    notes: dict[str, Any] = {"policy": str(policy), "criterion": chosen.name}
    if chosen.needs_gradient:
        notes["batches"] = count
    if zero_rows:
        notes["neurons that score zero"] = sum(zero_rows.values())
        worst = max(zero_rows, key=lambda name: zero_rows[name])
        hint = " Under fp16 autocast, scale the loss." if chosen.needs_gradient else ""
        warnings.warn(
            f"{sum(zero_rows.values())} neurons score zero everywhere (most in {worst}: {zero_rows[worst]}); "
            f"their first inputs were selected.{hint}",
            stacklevel=2,
        )
    return Selection(masks, notes)


def _accumulate(
    model: nn.Module,
    ranked: Mapping[str, nn.Parameter],
    batches: Iterable[Any],
    loss: Callable[[Any, Any], Tensor],
    each_batch: Callable[[Tensor], Tensor] | None,
    progress: bool | None,
) -> tuple[dict[str, Tensor], int]:
    """Sums over batches in at least float32, for the parameters that got any gradient; and the number of batches."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    for parameter in ranked.values():
        parameter.requires_grad_(True)
    sums: dict[str, Tensor] = {}
    count = 0
    for batch in tqdm(batches, desc="selection gradients", unit="batch", disable=_quiet(progress), leave=False):
        count += 1
        value = loss(model, batch)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            raise ValueError(
                f"loss(model, batch) must return a scalar that depends on the ranked parameters, got {_describe(value)}"
            )
        if not bool(value.isfinite()):
            raise ValueError(f"the selection loss of batch {count} is {value.item()}, so its gradients mean nothing")
        value.backward()
        for name, parameter in ranked.items():
            if parameter.grad is None:
                continue
            if each_batch is None and parameter.dtype in (torch.float32, torch.float64):
                sums[name] = parameter.grad  # autograd goes on adding to it
                continue
            grad = parameter.grad if parameter.dtype is torch.float64 else parameter.grad.float()
            parameter.grad = None
            grad = grad if each_batch is None else each_batch(grad)
            sums[name] = sums[name].add_(grad) if name in sums else grad
    if count == 0:
        raise ValueError("batches is empty: there is nothing to take gradients of")
    for name, total in sums.items():  # what was once not finite stays so in the sum
        if not bool(total.isfinite().all()):
            bad = int((~total.isfinite()).sum())
            raise ValueError(
                f"the gradient of {name} is not finite ({bad} of {total.numel()} entries); "
                "look for an overflow in half precision or a division by zero in the loss"
            )
    return sums, count


@contextmanager
def _kept(model: nn.Module) -> Iterator[None]:
    """Gives flags, gradients, modes, buffers and random number generators back as they were."""
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = {p.device for p, _, _ in parameters if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=[device.index for device in devices if device.index is not None]):
        try:
            with torch.enable_grad():
                yield
        finally:
            for parameter, requires_grad, grad in parameters:
                parameter.grad = grad
                parameter.requires_grad_(requires_grad)
            for module, training in modes:
                module.training = training
            with torch.no_grad():
                for module, name, buffer, original in buffers:
                    module._buffers[name] = buffer  # forward may have put another tensor in its place
                    if not torch.equal(buffer, original):
                        buffer.copy_(original)


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}" + ("" if value.requires_grad else " without a gradient")
    return type(value).__name__


def _quiet(progress: bool | None) -> bool | None:
    return None if progress is None else not progress  # tqdm's None: only on a terminal
