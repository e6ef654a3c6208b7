"""MaskedAdamW for transformers' Trainer, which makes its optimizer itself (``optimizer_cls_and_kwargs``)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from gradsel.attached import is_attached
from gradsel.masks import Mask
from gradsel.optim import MaskedAdamW
from gradsel.parameters.names import unwrapped
from gradsel.ranking.policies import Policy
from gradsel.selection import Selection, freeze

_OPTIONS = set(inspect.signature(MaskedAdamW).parameters) - {"params", "model"}


def masked_adamw(
    arguments: TrainingArguments,
    *,
    masks: Selection | Mapping[str, Mask] | None = None,
    policy: Policy | None = None,
    **options: Any,
) -> tuple[type[MaskedAdamWFactory], dict[str, Any]]:
    """What a Trainer takes as ``optimizer_cls_and_kwargs`` to train a selection with :class:`gradsel.MaskedAdamW`.

    Rate, betas, epsilon and weight decay are those of the arguments, and what Trainer does not decay (biases, norms) is
    not decayed. What is trained is the attached model's values; or, of a plain model, entries by masks or by a policy,
    from dense gradients::

        Trainer(model, arguments, ..., optimizer_cls_and_kwargs=masked_adamw(arguments))                   # attached
        Trainer(model, arguments, ..., optimizer_cls_and_kwargs=masked_adamw(arguments, masks=selection))
        Trainer(model, arguments, ..., optimizer_cls_and_kwargs=masked_adamw(arguments, policy=PerNeuron(1)))

    Masks go by the names of parameters. Parameters that they freeze get ``requires_grad=False``. If gradients are
    clipped (``max_grad_norm``), their norm is that of selected entries: those of frozen entries are zeroed as soon as
    they are computed. (In the steps that a policy ranks there is no selection yet, and all entries count.)

    Args:
        arguments: the same that the Trainer gets.
        masks: a :class:`gradsel.Selection`, or a dict of masks by parameter name.
        policy: instead, lets the first steps select; see :class:`gradsel.MaskedAdam`.
        **options: of :class:`gradsel.MaskedAdamW`, such as ``rules=``, ``select_after=`` or ``anchor=``; they win over
            the arguments.

    Returns:
        A factory, which Trainer calls with the model, and its keyword arguments.

    Raises:
        TypeError: an unknown option.
        ValueError: both masks and a policy; or ``reselect_every`` with ``max_grad_norm``.
    """
    if unknown := sorted(set(options) - _OPTIONS):
        raise TypeError(f"MaskedAdamW has no option {unknown[0]!r}; it has {', '.join(sorted(_OPTIONS))}")
    if masks is not None and policy is not None:
        raise ValueError("masks and policy are both given; masks say what is selected, policy selects it later")
    clips = arguments.max_grad_norm is not None and arguments.max_grad_norm > 0
    if clips and options.get("reselect_every") is not None:
        raise ValueError(
            f"reselect_every ranks dense gradients, and max_grad_norm={arguments.max_grad_norm:g} would clip them by "
            "the norm of all entries, frozen ones included; pass max_grad_norm=0 to TrainingArguments"
        )
    settings = {
        "lr": arguments.learning_rate,
        "betas": (arguments.adam_beta1, arguments.adam_beta2),
        "eps": arguments.adam_epsilon,
        "weight_decay": arguments.weight_decay,
        **options,
    }
    return MaskedAdamWFactory, {"masks": masks, "policy": policy, "clips": clips, "options": settings}


class MaskedAdamWFactory:
    """Makes the optimizer when Trainer has the model; see :func:`masked_adamw`."""

    def __call__(
        self,
        model: nn.Module,
        *,
        masks: Selection | Mapping[str, Mask] | None,
        policy: Policy | None,
        clips: bool,
        options: Mapping[str, Any],
    ) -> MaskedAdamW:
        """
        Raises:
            KeyError: the masks lack a parameter of the model.
            ValueError: nothing says what is trained; or masks or a policy are given for an attached model.
        """
        _require_selected(model, masks, policy)
        if masks is not None:
            freeze(unwrapped(model), masks if isinstance(masks, Selection) else Selection(masks))
        options = dict(options)
        decay = options.pop("weight_decay")
        decayed = set(Trainer.get_decay_parameter_names(None, model))  # it looks at nothing but the model
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        groups = [
            {"params": [each for each in trained if each[0] in decayed], "weight_decay": decay},
            {"params": [each for each in trained if each[0] not in decayed], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        own: dict[str, Any] = {} if policy is None else {"policy": policy, "model": unwrapped(model)}
        optimizer = MaskedAdamW(groups, masks=masks, **own, **options)
        if clips and (masks is not None or policy is not None):
            for _, parameter in trained:
                _leave_out_frozen(parameter, optimizer)
        return optimizer


def _require_selected(model: nn.Module, masks: Any, policy: Policy | None) -> None:
    if is_attached(model):
        if masks is not None or policy is not None:
            raise ValueError(
                f"{'masks' if policy is None else 'policy'} is given, but the model is attached and knows what it "
                "trains; leave it out"
            )
        return
    if masks is None and policy is None and all(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "nothing says what is trained, so all of the model would be: attach it before the Trainer is made "
            "(gradsel.attach(model, selection)), or pass masks= or policy= to masked_adamw()"
        )


def _leave_out_frozen(parameter: nn.Parameter, optimizer: MaskedAdamW) -> None:
    """Zeroes the gradients of entries that are not selected, before anything adds, averages or clips them."""

    def selected_only(grad: Tensor) -> Tensor | None:
        mask = optimizer._masks.get(parameter) if optimizer.selection is not None else None
        if mask is None or mask.is_whole or not mask.nnz:
            return None
        kept = torch.zeros_like(grad)
        mask.scatter_(kept, mask.gather(grad))
        return kept

    parameter.register_hook(selected_only)
