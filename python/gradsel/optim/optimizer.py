"""MaskedAdam: Adam on the selected entries, as a drop-in ``torch.optim.Optimizer``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from gradsel.masks import Mask
from gradsel.nn import AttachReport
from gradsel.optim.attaching import attach_with
from gradsel.optim.clipping import clip
from gradsel.optim.groups import (  # fmt: skip
    bind,
    check_masks,
    check_names,
    check_options,
    check_torch_options,
    complete_options,
    names_of,
    warn_of_rounded_moments,
)
from gradsel.optim.loading import dense_state_dict, loaded
from gradsel.optim.reselecting import load_selection, reselect_with
from gradsel.optim.selector import Selector, model_of
from gradsel.optim.stepping import Stepping
from gradsel.parameters.names import strip_wrappers
from gradsel.parameters.rules import RuleOptions
from gradsel.ranking.criteria import Criterion, Score
from gradsel.ranking.policies import Policy
from gradsel.selection.selection import Selection

Loss = TypeVar("Loss")


class MaskedAdam(Stepping):
    """Adam (Kingma and Ba 2015) and AdamW (Loshchilov and Hutter 2019) that train only what a selection says.

    Argument order, defaults and behaviour are those of :class:`torch.optim.Adam`; without ``masks`` it is Adam. With
    them, unselected entries never change by a bit, and the state has the size of the selection. For each selected entry
    it holds two float32 numbers (float64 for float64 parameters), and a float32 master copy if the parameter is
    bfloat16 or float16.

    An anchor holds the selected entries near their pre-trained values, as in GRFT. It may differ between groups. The
    pre-trained values are kept in the state: one more number of the same dtype for each selected entry.

    If something else writes a weight between two steps, the next step starts from the new value. Only writes in place
    through ``.data`` cannot be noticed; where there is a master copy, they are lost.

    One kernel call updates a whole parameter group. On a model prepared by :func:`gradsel.attach`, which needs no
    ``masks`` here, that call writes the values, the moments and the weights themselves.

    Args:
        params: parameters, named parameters (``model.named_parameters()``, required with ``masks``) or groups. A group
            may have its own ``"masks"``, which replace the argument's; None trains it whole.
        lr: learning rate; a 1-element tensor is read at every step, which waits for its device unless ``capturable``.
        betas: decay rates of the two moments; floats or 1-element tensors.
        eps: added to the denominator.
        weight_decay: decay of the selected entries; an L2 term in the gradient unless ``decoupled_weight_decay``.
        amsgrad: use the running maximum of the second moment (Reddi et al. 2018).
        masks: a :class:`~gradsel.selection.Selection`, or a dict of masks, keyed by parameter name; prefixes of
            DistributedDataParallel and torch.compile are ignored. Parameters with the mask Frozen never change.
        foreach: recorded in the groups as torch does. It changes nothing: the only implementation is fused.
        fused: likewise, except that with True, as in torch, a :class:`torch.amp.GradScaler` leaves unscaling and
            skipping to the kernel, which saves a synchronisation.
        capturable: accepted on devices on which torch allows it. A step can then be captured in a CUDA graph, after at
            least one outside of it. ``lr`` and ``betas`` as tensors on the parameters' device are read by every replay;
            all other hyperparameters stay what they were at capture.
        differentiable: must be False, because the kernels write in place.
        maximize: maximise the objective.
        decoupled_weight_decay: decay as in AdamW.
        anchor: strength of the pull of selected entries towards their original values: ``anchor * ||w - w_pre||_2^2``
            is added to the loss ("Gradient-based and Regularized Fine-Tuning", under review 2026, Alg. 1 line 8). This
            adds ``2 * anchor * (w - w_pre)`` to the gradient, after weight decay, also with ``maximize``. For attached
            weights the originals are the values at attach(). For all others, including heads and biases that are
            trained whole, they are the values at the first step with an anchor; a checkpoint can be loaded before that
            step. They are in the state_dict, and a resumed run keeps them.
        anchor_decoupled: the pull moves the entries themselves before Adam's update, after decoupled weight decay, and
            does not enter the moments: ``w -= 2 * lr * anchor * (w - w_pre)``. Keep ``lr * anchor`` below 1/2, or the
            entries overshoot.
        anchor_norm: 2, or 1 for ``anchor * ||w - w_pre||_1``: a gradient of ``anchor * sign(w - w_pre)``, or, if
            decoupled, a step of ``lr * anchor`` towards the original that stops there (soft thresholding).
        policy: instead of ``masks``, lets the first step select: it ranks the dense gradients that it is given, by the
            rules of :func:`gradsel.select`, and trains the selected entries from then on, biases and heads included.
            ``PerNeuron`` with the criterion ``"gradient"`` selects and updates in one kernel call. Unselected entries
            never change by a bit, and non-finite gradients are refused. Until a ranked parameter has a gradient other
            than zero, only what is trained whole is updated. Needs ``model.named_parameters()`` itself as
            ``params``, or ``model``. Processes must step with the same gradients, as under DistributedDataParallel.
        criterion: with ``policy``, what makes an entry worth training; see :func:`gradsel.select`.
        rules: with ``policy``, a dict of keyword arguments ``head``, ``kinds``, ``blocks``, ``skip_blocks``, ``rank``,
            ``whole``, ``freeze``; see :func:`gradsel.parameters.rules.parameter_rules`.
        select_after: with ``policy``, the number of steps whose gradients are added up and ranked together. Those
            before the last one change nothing.
        reselect_every: with ``policy``, the number of steps after which the gradients of the last ``select_after``
            steps are ranked again, as by :meth:`reselect`; at least ``select_after``. None: never.
        model: with ``policy``, the model, if ``params`` is not ``model.named_parameters()``. It is not kept.
        low_precision: how small steps survive rounding in bfloat16 and float16 weights (8 and 11 significant bits):
            ``"master"`` keeps a float32 copy of the selected entries, 4 bytes each; ``"kahan"`` keeps each rounding
            error in the dtype of the weight, 2 bytes each; ``"stochastic"`` rounds up or down at random, right on
            average, and keeps nothing. The values of an attached model are float32 and need none of them.
        seed: for stochastic rounding, 0 to 2**31 - 1. A resumed run draws the same numbers as an uninterrupted one.
        state_dtype: dtype of the moments: None for float32 (float64 for float64 parameters), or ``torch.bfloat16``,
            which halves their memory and rounds them at every step. Use betas of at most 0.99 with it: above that,
            second moments never decrease.

    Raises:
        ValueError: a hyper-parameter out of range; ``masks`` with unnamed parameters; a mask of another shape;
            ``differentiable``.
            With ``policy``: also ``masks``; no model; parameters without names, or of another model.
        TypeError: ``masks`` is not a mapping, or one of its values is not a mask; ``policy`` is not a policy.
        KeyError: a parameter that ``masks`` does not know.
        RuntimeError: ``fused`` and ``foreach`` together.
    """

    #: Tells the hook that attach() installs for other optimizers that a step has already written the weights.
    writes_weights = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        masks: Selection | Mapping[str, Mask] | None = None,
        policy: Policy | None = None,
        criterion: str | Criterion | Score = "gradient",
        rules: RuleOptions | None = None,
        select_after: int = 1,
        reselect_every: int | None = None,
        model: nn.Module | None = None,
        anchor: float = 0.0,
        anchor_decoupled: bool = False,
        anchor_norm: int = 2,
        low_precision: str = "master",
        seed: int = 0,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        check_masks(masks)
        self._selection = masks
        self._masks, self._own_masks, self._versions = {}, {}, {}
        self._forget_calls()
        defaults = {
            "lr": lr,
            "betas": tuple(beta.squeeze() if isinstance(beta, Tensor) else beta for beta in betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
            "anchor": anchor,
            "anchor_decoupled": anchor_decoupled,
            "anchor_norm": anchor_norm,
            "low_precision": low_precision,
            "seed": seed,
            "state_dtype": state_dtype,
        }
        check_torch_options(defaults)
        check_options(defaults)
        if policy is not None:
            if masks is not None:
                raise ValueError("masks and policy are both given; masks say what is selected, policy selects it later")
            self._selector = Selector(model_of(params, model), policy, criterion, rules, select_after, reselect_every)
        elif (select_after, reselect_every, rules) != (1, None, None):
            raise ValueError("rules, select_after and reselect_every say how policy selects; pass policy=PerNeuron(1)")
        super().__init__(params, defaults)

    @property
    def selection(self) -> Selection | None:
        """What is trained: ``masks``, or what ``policy`` has selected, with the masks that groups have of their own.

        None before ``policy`` has selected, and without either.
        """
        masks = self._selection
        if masks is None:
            return None
        selection = masks if isinstance(masks, Selection) else Selection(masks)
        own = {
            strip_wrappers(name): self._own_masks[parameter]
            for group in self.param_groups
            for name, parameter in zip(names_of(group) or (), group["params"], strict=False)
            if parameter in self._own_masks
        }
        return Selection({**selection, **own}, selection.notes, selection.base) if own else selection

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether GradScaler sets ``grad_scale`` and ``found_inf`` and leaves the rest to :meth:`step`.

        As in torch's Adam it is False unless ``fused=True``: where it is True, Lightning refuses to clip gradients.
        """
        return bool(self.defaults.get("fused"))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch, except that the group may have its own ``"masks"``. If they do not fit, it is not added."""
        masks, is_own = self._selection, False
        if isinstance(param_group, dict) and "masks" in param_group:
            masks = param_group["masks"]
            is_own = masks is not self._selection or self._selector is not None
            param_group = {key: value for key, value in param_group.items() if key != "masks"}
            check_masks(masks)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_options(group)
            bound = bind(group, masks)
            if self._selector is not None and not is_own:
                check_names(group)
                self._selector.check(list(map(strip_wrappers, group["param_names"])), group["params"])
        except Exception:
            self.param_groups.pop()
            raise
        self._masks.update(bound)
        if is_own:
            self._own_masks.update(bound)
        warn_of_rounded_moments(group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Loss]) -> Loss: ...

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on every parameter that has a gradient.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            RuntimeError: a gradient is sparse or complex.
            AssertionError: ``capturable`` on a device where torch does not have it.
        """
        return self._watched_step(closure) if self._is_watched() else self._plain_step(closure)

    step.hooked = True  # type: ignore[attr-defined]  # torch is not to wrap it as well

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
        """Clips the norm of the gradients of all selected entries, taken as one vector.

        :func:`torch.nn.utils.clip_grad_norm_` would also count the gradients of frozen entries, and clip more. Models
        prepared by :func:`gradsel.attach` have no such gradients, and there the two functions do the same.

        Args:
            max_norm: the largest norm that is not clipped.
            norm_type: ``"inf"`` or any number.
            error_if_nonfinite: raise if the norm is NaN or infinite.

        Returns:
            The norm before clipping, a scalar.

        Raises:
            RuntimeError: the norm is not finite, and ``error_if_nonfinite`` is True.
        """
        targets = chain.from_iterable(map(self._targets, self.param_groups))
        return clip(targets, max_norm, norm_type, error_if_nonfinite)

    @torch.no_grad()
    def reselect(self, selection: Selection | Mapping[str, Mask]) -> None:
        """Replaces the masks of all groups except those with their own masks.

        Entries that stay selected keep their state bit for bit, and the step count of their parameter. New entries
        start with moments of zero and are anchored to their current values. Entries that are no longer selected stay
        frozen at their current values.

        Args:
            selection: as ``masks`` of the constructor.

        Raises:
            ValueError: the model is attached (detach it, attach it with the new selection, and load
                :meth:`dense_state_dict` into a new optimizer), or as from the constructor. Nothing has changed.
            KeyError, TypeError: as from the constructor.
        """
        reselect_with(self, selection)

    def attach(self, model: nn.Module) -> AttachReport:
        """Attaches the model to :attr:`selection` and goes on training it: later steps form no dense gradients.

        The groups keep their options and schedulers; values take the place of their weights, with their moments,
        originals and step counts to the bit, and with their masters. Gradients of weights are dropped, so call it
        between two steps. To be called before the model is wrapped in DistributedDataParallel or torch.compile.

        Args:
            model: the one whose parameters the optimizer has.

        Returns:
            What :func:`gradsel.attach` did.

        Raises:
            ValueError: nothing has been selected yet; ``reselect_every`` needs dense gradients; it is another model; or
                as from :func:`gradsel.attach`. Nothing has changed.
        """
        return attach_with(self, model, self.selection)

    @torch._disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """As in torch; with ``policy`` it also holds the selection, or the gradients added up for it so far.

        Its tensors are in mask order. ``torch.optim.Adam`` compares no shapes when it loads them for dense parameters,
        and fails at its next step: give it :meth:`dense_state_dict`.
        """
        state_dict = super().state_dict()
        if self._selector is not None:
            state_dict["selection"] = self._selector.saved(self._selection)
        return state_dict

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict` returned, without rounding, onto the parameters' devices.

        A state of ``torch.optim.Adam`` or ``AdamW`` for the same parameters works too. A dense run then continues as a
        masked one, with the moments of the selected entries; options that torch's Adam does not have keep their values.
        States are matched by name if both optimizers have parameter names, and otherwise by order. A dense state for
        an attached model needs names.

        Args:
            state_dict: is copied.

        Raises:
            ValueError: the groups differ, or the state was trained with another selection. Nothing has changed.
        """
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = before(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        # From here on as Optimizer.load_state_dict, which would round moments to the dtype of the parameter.
        kept = self._selection, dict(self._masks)
        selector = copy.copy(self._selector)
        try:
            load_selection(self, state_dict)
            new = loaded(state_dict, self.param_groups, map(self._targets, self.param_groups))
        except Exception:
            self._selection, self._masks = kept
            self._selector = selector
            raise
        self.__setstate__(new)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    @torch.no_grad()
    def dense_state_dict(self) -> dict[str, Any]:
        """A state_dict for ``torch.optim.Adam``: moments in the shape of the parameters, zero at frozen entries.

        The parameters are those of this optimizer, in the same order; values of an attached model stand for their
        weights. The moments are float32 (float64 for float64 parameters) and are copies. Masters and originals are left
        out.
        """
        return dense_state_dict(self.param_groups, self.state, self._masks)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for options in (self.defaults, *self.param_groups):
            complete_options(options)
        for parameter, own in self.state.items():
            if "step" in own and not isinstance(own["step"], Tensor):  # from torch before 1.12
                own["step"] = torch.tensor(float(own["step"]), device=parameter.device)
        self._versions = {}
        self._forget_calls()

    def __getstate__(self) -> dict[str, Any]:
        # Optimizer pickles and copies only its own three attributes. A copy without masks would train everything.
        names = "_selection", "_masks", "_own_masks", "_selector"
        return {**super().__getstate__(), **{name: getattr(self, name) for name in names}}
