"""What torch.compile traces of a step: the operators themselves, without the plans of :mod:`gradsel.optim.call`.

Finding masks, states and places in memory is left to ``_init_group``. Torch's compiler knows this method of optimizers:
it runs it as it is, once, while it compiles a step, and finds out where the tensors in the filled lists came from. So
only what every step computes is traced.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import gradsel_kernels as gk
from gradsel.dtypes import adopted
from gradsel.optim.call import Call
from gradsel.optim.rates import rates_on

#: Sizes, strides and offset of an alias; None for the tensor itself.
Form = tuple[tuple[int, ...], tuple[int, ...], int] | None
#: Forms of gradients: compact ones, and those whose selected entries the kernel cannot find by itself.
CONTIGUOUS, GATHERED = "contiguous", "gathered"


#: The arguments of ``masked_adam_`` that are taken as they are.
_OF_CALL = (
    "exp_avgs", "exp_avg_sqs", "steps", "indices", "values", "max_exp_avg_sqs", "originals", "compensations", "layouts",
    "seeds",
)  # fmt: skip
#: The lists that ``_init_group`` fills, with an entry for each tensor. The compiler knows parameters, gradients and
#: states, but no aliases of them: of those there is the form.
LISTS = ("weights", "weight_forms", "grads", "grad_forms", "entries", "is_master", *_OF_CALL)


def fill(call: Call, lists: dict[str, Any], into: tuple[list, ...], kept: dict[Tensor, Tensor]) -> None:
    """Fills the lists named in :data:`LISTS` with a call.

    Args:
        lists: of the call.
        into: the lists, empty.
        kept: entries of masks by parameter. They are added to, because the compiler holds tensors weakly.
    """
    found = {name: into[i] for i, name in enumerate(LISTS)}
    for name in _OF_CALL:
        found[name].extend(lists[name] or ())
    for target, weight, grad, state in zip(call.targets, lists["weights"], lists["grads"], call.states, strict=True):
        given = target.parameter.grad
        assert given is not None
        found["weights"].append(target.weight)
        found["weight_forms"].append(_form(weight, target.weight))
        found["grads"].append(given)
        is_alias = grad.untyped_storage().data_ptr() == given.untyped_storage().data_ptr()
        is_master = "master" in state
        found["is_master"].append(is_master)
        found["grad_forms"].append(CONTIGUOUS if target.is_compact else _form(grad, given) if is_alias else GATHERED)
        if (is_master or found["grad_forms"][-1] == GATHERED) and target.parameter not in kept:
            kept[target.parameter] = target.mask.ordered_entries()
        found["entries"].append(kept.get(target.parameter))


def _form(alias: Tensor, tensor: Tensor) -> Form:
    if alias is tensor:
        return None
    return tuple(alias.shape), tuple(alias.stride()), int(alias.storage_offset())


@torch.library.custom_op("gradsel::adopt_written", mutates_args=("masters",))
def adopt_written(masters: Sequence[Tensor], weights: Sequence[Tensor], entries: Sequence[Tensor]) -> None:
    """Masters take over the entries of half-precision weights that somebody has written since the last step.

    An operator, because compiled code need not round a number before it compares it.

    Args:
        entries: row-major indices of the selected entries of each weight, in mask order.
    """
    for master, weight, index in zip(masters, weights, entries, strict=True):
        master.copy_(adopted(master, weight.reshape(-1)[index].reshape(master.shape)))


@adopt_written.register_fake
def _(masters: Sequence[Tensor], weights: Sequence[Tensor], entries: Sequence[Tensor]) -> None:
    return None


def step(group: dict[str, Any], into: tuple[list, ...], scaler: dict[str, Any]) -> None:
    """The call with the lists that :func:`fill` has filled. This is traced.

    Args:
        group: has the hyperparameters. Numbers are handed over in a tensor: as arguments they would be constants, and
            each new learning rate compiled anew.
    """
    (
        weights, weight_forms, grads, grad_forms, entries, is_master, exp_avgs, exp_avg_sqs, steps, indices, values,
        maxima, originals, compensations, layouts, seeds,
    ) = into  # fmt: skip
    rounded = [i for i in range(len(weights)) if is_master[i]]
    if rounded:
        adopt_written([values[i] for i in rounded], [weights[i] for i in rounded], [entries[i] for i in rounded])
    seen, given = [], []
    for i in range(len(weights)):
        weight, grad = weights[i], grads[i]
        seen.append(weight if weight_forms[i] is None else weight.as_strided(*weight_forms[i]))
        form = grad_forms[i]
        if form == CONTIGUOUS:
            grad = grad.contiguous()
        elif form == GATHERED:
            grad = grad.reshape(-1)[entries[i]].reshape(exp_avgs[i].shape)
        elif form is not None:
            grad = grad.as_strided(*form)
        given.append(grad)
    gk.masked_adam_(
        seen,
        given,
        exp_avgs,
        exp_avg_sqs,
        steps,
        indices=indices,
        layouts=layouts,
        values=values,
        max_exp_avg_sqs=maxima or None,
        originals=originals or None,
        seeds=seeds or None,
        compensations=compensations or None,
        lr=0.0,
        decoupled_weight_decay=group["decoupled_weight_decay"],
        maximize=group["maximize"],
        anchor_l1=group["anchor_norm"] == 1,
        anchor_decoupled=group["anchor_decoupled"],
        numbers=_numbers(group),
        rates=rates_on(group, weights[0].device),
        **scaler,
    )


def _numbers(group: dict[str, Any]) -> Tensor:
    """See :func:`gradsel_kernels.masked_adam_`."""
    beta1, beta2 = group["betas"]
    numbers = [group["lr"], beta1, beta2, group["eps"], group["weight_decay"], group["anchor"]]
    if group["capturable"]:  # what is on the device stays there: see rates_on
        numbers = [0.0 if isinstance(number, Tensor) else number for number in numbers]
    return torch.stack([_number(number) for number in numbers])


def _number(number: float | Tensor) -> Tensor:
    if isinstance(number, Tensor):
        return number.detach().reshape(()).to("cpu", torch.float64)
    # A sum: of the operators that make a tensor of a number, the compiler keeps only arithmetic free of its value.
    return torch.zeros((), dtype=torch.float64) + number
