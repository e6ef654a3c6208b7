"""The step at which MaskedAdam selects: gradients become masks, and, where possible, moments in the same call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

import gradsel_kernels as gk
from gradsel.dtypes import trained_dtype
from gradsel.masks import Mask, PerRow, fingerprint
from gradsel.optim.call import refuse_sparse, version_of
from gradsel.optim.groups import check_options, check_parameter, replaced_by_hand
from gradsel.optim.selector import Selector, fingerprints_of, require_agreement, silent_rows
from gradsel.optim.state import FINGERPRINT
from gradsel.parameters.names import strip_wrappers
from gradsel.views import NeuronView

#: A :class:`gradsel.MaskedAdam`, whose module imports this one.
Optimizer = Any


class Trained(NamedTuple):
    """A parameter of the optimizer, and where it is: in which group, and at which place of all parameters."""

    name: str
    parameter: Tensor
    group: dict[str, Any]
    place: int


def select_in_step(optimizer: Optimizer, selector: Selector) -> frozenset[Tensor] | None:
    """What has to be done about the selection before a step.

    Returns:
        The parameters that the step has to leave alone, because theirs has been done or they cannot be trained yet;
        None if there is no step.
    """
    selected = optimizer._selection is not None
    if selected and selector.every is None:
        return frozenset()
    found_inf = optimizer.found_inf if hasattr(optimizer, "found_inf") else None
    if found_inf is not None and found_inf.item() != 0:  # a step that will be skipped does not count
        return frozenset() if selected else None

    @cache
    def grads() -> dict[str, Tensor]:
        """Of ranked parameters: as they are where their scale does not matter, otherwise without a scaler's."""
        found = {
            each.name: each.parameter.grad
            for each in _trained(optimizer)
            if selector.rules[each.name].action == "rank" and each.parameter.grad is not None
        }
        refuse_sparse(found.values())
        if selector.ranks_as_they_are or getattr(optimizer, "grad_scale", None) is None:
            return found
        return {name: _unscaled(optimizer, grad) for name, grad in found.items()}

    if selector.reads_gradients(selected) and not any(bool(grad.any()) for grad in grads().values()):
        return frozenset() if selected else _before_ranking(optimizer, selector)
    if not selector.is_due(selected, grads):
        return frozenset() if selected else None
    trained = {each.name: each for each in _trained(optimizer)}
    parameters = {name: each.parameter for name, each in trained.items()}
    try:
        _check(optimizer, selector)
        is_new = not any(parameters[name] in optimizer.state for name in grads())
        if selector.ranks_as_they_are and not selected and is_new:
            return _fused(optimizer, selector, trained, grads(), parameters)
        selection = selector.choose(parameters, grads(), {}, fingerprints_of(parameters))
        require_agreement(selection)
    except Exception:
        selector.failed(selected)
        raise
    optimizer.reselect(selection)
    return frozenset()


def _unscaled(optimizer: Optimizer, grad: Tensor) -> Tensor:
    """A copy of a gradient without its scale, as GradScaler.unscale_ makes it: steps may have different scales."""
    scale = optimizer._from_scaler("grad_scale", grad.device)
    return grad.detach().to(trained_dtype(grad)) * scale.double().reciprocal().float()


def _trained(optimizer: Optimizer) -> Iterator[Trained]:
    """The parameters that the optimizer selects in: those of groups without masks of their own."""
    place = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in optimizer._masks:
                raise KeyError(replaced_by_hand(parameter))
        names = group.get("param_names") or [""] * len(group["params"])
        for name, parameter in zip(names, group["params"], strict=True):
            if parameter not in optimizer._own_masks:
                yield Trained(strip_wrappers(name), parameter, group, place)
            place += 1


def _before_ranking(optimizer: Optimizer, selector: Selector) -> frozenset[Tensor] | None:
    """What to do without a gradient to rank: a head that starts at zero, for example, has to move first.

    So what is trained whole is trained alone. If its gradients are zero, too, there is no step: checkpointing tools
    make such steps to create states.
    """
    trained = list(_trained(optimizer))
    ranked = [each for each in trained if selector.rules[each.name].action == "rank"]
    whole = {each.parameter for each in trained if selector.rules[each.name].action == "whole"}
    found = [parameter.grad for parameter in whole if parameter.grad is not None]
    refuse_sparse(found)
    if selector.steps or not any(bool(grad.any()) for grad in found):
        return None
    selector.report_waiting([each.parameter for each in ranked])
    return frozenset(each.parameter for each in trained if each.parameter not in whole)


def _check(optimizer: Optimizer, selector: Selector) -> None:
    """Refuses what the rest of the step would refuse, before anything has changed."""
    for group in optimizer.param_groups:
        check_options(group)
    trained = [each for each in _trained(optimizer) if selector.rules[each.name].action != "freeze"]
    selector.check([each.name for each in trained], [each.parameter for each in trained])
    for each in trained:
        if each.parameter.grad is not None:
            refuse_sparse([each.parameter.grad])
            check_parameter(each.parameter, each.group["capturable"])


class _Fused(NamedTuple):
    """A call of the fused operator: its parameters, their views and gradients, and what it has made."""

    trained: list[Trained]
    matrices: list[Tensor]
    grads: list[Tensor]
    first: gk.FirstStep


def _fused(
    optimizer: Optimizer,
    selector: Selector,
    trained: Mapping[str, Trained],
    grads: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
) -> frozenset[Tensor]:
    """Selects and updates all parameters that the operator can take; ranks the others."""
    calls: dict[tuple[int, torch.device], list[tuple[Trained, Tensor, Tensor]]] = {}
    for name, grad in grads.items():
        each = trained[name]
        view = selector.rules[name].view
        matrix, ranked = _matrix(view, each.parameter), _matrix(view, grad)
        if matrix is not None and ranked is not None:
            calls.setdefault((id(each.group), grad.device), []).append((each, matrix, ranked))
    base = fingerprints_of(parameters)  # before they change
    done: list[_Fused] = []
    try:
        for members in calls.values():
            done.append(_run(optimizer, selector, members))
        masks, silent = _masks(selector, done)
        selection = selector.choose(parameters, grads, masks, base)
        if silent:
            selection.notes["neurons that score zero"] = silent + selection.notes.get("neurons that score zero", 0)
        require_agreement(selection)
    except Exception:
        for call in done:
            for matrix, cols, original in zip(call.matrices, call.first.cols, call.first.originals, strict=True):
                gk.scatter_rows_(matrix, cols, original)
        raise
    optimizer.reselect(selection)
    for call in done:
        _take_over(optimizer, call, masks)
    return frozenset(each.parameter for call in done for each in call.trained)


def _matrix(view: NeuronView, tensor: Tensor) -> Tensor | None:
    """The neuron view as an alias; None for a tensor that the operator does not take."""
    plain = tensor.layout is torch.strided and tensor.dtype in (
        torch.float32, torch.bfloat16, torch.float16, torch.float64,
    )  # fmt: skip
    return view.alias(tensor.detach()) if plain else None


def _run(optimizer: Optimizer, selector: Selector, members: list[tuple[Trained, Tensor, Tensor]]) -> _Fused:
    trained, matrices, grads = (list(part) for part in zip(*members, strict=True))
    group = trained[0].group
    beta1, beta2 = group["betas"]
    low_precision = group["low_precision"]
    seeds = None
    if low_precision == "stochastic":
        seeds = [(group["seed"] << 32) + each.place if _is_half(each.parameter) else None for each in trained]
    first = gk.topk_masked_adam_(
        matrices,
        grads,
        selector.policy.k,  # type: ignore[attr-defined]
        lr=float(group["lr"]),
        beta1=float(beta1),
        beta2=float(beta2),
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        decoupled_weight_decay=group["decoupled_weight_decay"],
        maximize=group["maximize"],
        amsgrad=group["amsgrad"],
        anchor=float(group["anchor"]),
        anchor_l1=group["anchor_norm"] == 1,
        anchor_decoupled=group["anchor_decoupled"],
        low_precision=low_precision,
        seeds=seeds,
        moment_dtype=group["state_dtype"],
        bits=False,
        originals=True,
        grad_scale=optimizer._from_scaler("grad_scale", matrices[0].device),
    )
    return _Fused(trained, matrices, grads, first)


def _is_half(parameter: Tensor) -> bool:
    return parameter.dtype in (torch.bfloat16, torch.float16)


def _masks(selector: Selector, calls: list[_Fused]) -> tuple[dict[str, Mask], int]:
    """The masks that the operator has chosen, and how many neurons have no gradient.

    Raises:
        ValueError: a gradient is not finite.
    """
    masks: dict[str, Mask] = {}
    silent = 0
    for call in calls:
        for each, grad, cols in zip(call.trained, call.grads, call.first.cols, strict=True):
            selected = gk.gather_rows(grad, cols)  # with the largest of every row, NaN and infinity ahead of all
            if not bool(selected.isfinite().all()):
                bad = int((~grad.isfinite()).sum())
                raise ValueError(
                    f"the gradient of {each.name} is not finite ({bad} of {grad.numel()} entries), so nothing can be "
                    "selected by it, and nothing has changed; look for an overflow in half precision or a division by "
                    "zero in the loss, or use a GradScaler"
                )
            silent += silent_rows(selected)
            masks[each.name] = PerRow(cols, each.parameter.shape, selector.rules[each.name].view)
    return masks, silent


def _take_over(optimizer: Optimizer, call: _Fused, masks: Mapping[str, Mask]) -> None:
    """Makes the states of the operator those of the optimizer."""
    first = call.first
    for i, each in enumerate(call.trained):
        state: dict[str, Any] = {
            "step": first.steps[i],
            "exp_avg": first.exp_avgs[i],
            "exp_avg_sq": first.exp_avg_sqs[i],
            FINGERPRINT: fingerprint(masks[each.name]),
        }
        if first.max_exp_avg_sqs:
            state["max_exp_avg_sq"] = first.max_exp_avg_sqs[i]
        if each.group["anchor"]:
            state["original"] = first.originals[i]
        value, lost = first.values[i], first.compensations[i]
        if value is not None:
            state["master"] = value
            optimizer._versions[each.parameter] = version_of(each.parameter)
        if lost is not None:
            state["compensation"] = lost
        optimizer.state[each.parameter] = state
