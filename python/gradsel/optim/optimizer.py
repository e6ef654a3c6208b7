"""MaskedAdam: Adam on the selected entries, as a drop-in ``torch.optim.Optimizer``."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

import gradsel_kernels as gk
from gradsel.attached import owner_of
from gradsel.masks import Mask, Whole
from gradsel.optim.call import Call, Plan, State, Target, calls_by_device, refuse_sparse, target_of, version_of
from gradsel.optim.completing import complete
from gradsel.optim.groups import (  # fmt: skip
    bind,
    check_anchor,
    check_masks,
    check_options,
    check_parameter,
    check_torch_options,
    complete_options,
    warn_of_rounded_moments,
)
from gradsel.optim.loading import dense_state_dict, loaded
from gradsel.optim.state import migrated
from gradsel.selection.selection import Selection
from gradsel_kernels.adam_call import AdamOptions

#: Options of a group that decide which tensors its kernel calls take, so that a plan holds for their values only.
_DECIDING_OPTIONS = ("amsgrad", "capturable", "differentiable", "low_precision", "seed", "state_dtype")


def _hyperparameters(group: dict[str, Any]) -> AdamOptions:
    beta1, beta2 = group["betas"]
    return AdamOptions(
        float(group["lr"]),
        float(beta1),
        float(beta2),
        group["eps"],
        group["weight_decay"],
        group["decoupled_weight_decay"],
        group["maximize"],
        float(group["anchor"]),
        group["anchor_norm"] == 1,
        group["anchor_decoupled"],
    )


class MaskedAdam(Optimizer):
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
        lr: learning rate; a 1-element tensor is read at every step, which waits for its device.
        betas: decay rates of the two moments; floats or 1-element tensors.
        eps: added to the denominator.
        weight_decay: decay of the selected entries; an L2 term in the gradient unless ``decoupled_weight_decay``.
        amsgrad: use the running maximum of the second moment (Reddi et al. 2018).
        masks: a :class:`~gradsel.selection.Selection`, or a dict of masks, keyed by parameter name; prefixes of
            DistributedDataParallel and torch.compile are ignored. Parameters with the mask Frozen never change.
        foreach: recorded in the groups as torch does. It changes nothing: the only implementation is fused.
        fused: likewise, except that with True, as in torch, a :class:`torch.amp.GradScaler` leaves unscaling and
            skipping to the kernel, which saves a synchronisation.
        capturable: accepted on devices on which torch allows it. The backend ``"cuda"`` of gradsel_kernels can capture
            a step in a CUDA graph, with the hyperparameters at capture; ``"triton"`` refuses to.
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
        TypeError: ``masks`` is not a mapping, or one of its values is not a mask.
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
        anchor: float = 0.0,
        anchor_decoupled: bool = False,
        anchor_norm: int = 2,
        low_precision: str = "master",
        seed: int = 0,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        check_masks(masks)
        self._selection = masks
        self._masks: dict[Tensor, Mask] = {}
        self._own_masks: dict[Tensor, Mask] = {}  # from groups with masks of their own
        # Versions and addresses of low-precision parameters after the last step of this optimizer.
        self._versions: dict[Tensor, tuple[int, int]] = {}
        self._plans: dict[int, Plan] = {}  # by number of the group
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
        super().__init__(params, defaults)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether GradScaler sets ``grad_scale`` and ``found_inf`` and leaves the rest to :meth:`step`.

        As in torch's Adam it is False unless ``fused=True``: where it is True, Lightning refuses to clip gradients.
        """
        return bool(self.defaults.get("fused"))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch, except that the group may have its own ``"masks"``. If they do not fit, it is not added."""
        masks = self._selection
        if isinstance(param_group, dict) and "masks" in param_group:
            masks = param_group["masks"]
            param_group = {key: value for key, value in param_group.items() if key != "masks"}
            check_masks(masks)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_options(group)
            bound = bind(group, masks)
        except Exception:
            self.param_groups.pop()
            raise
        self._masks.update(bound)
        if masks is not self._selection:
            self._own_masks.update(bound)
        warn_of_rounded_moments(group)

    @torch.no_grad()
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
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    @torch._disable_dynamo
    def _update(self) -> None:
        """A graph break under torch.compile: one kernel call has nothing to fuse, and plans check themselves."""
        with torch._C.DisableTorchFunctionSubclass():  # reads the weights of attached models as plain tensors
            self._update_groups()

    def _update_groups(self) -> None:
        for number, group in enumerate(self.param_groups):
            check_anchor(group)
            plan = self._plans.pop(number, None)
            if plan is not None and plan.holds(group, self.state):
                plan.run(_hyperparameters(group), self._from_scaler)
            else:
                grads = [parameter.grad for parameter in group["params"]]
                calls = self._calls(number, grads)
                for call in calls:
                    self._run(call, group)
                plan = Plan(group, grads, calls, self.state, _DECIDING_OPTIONS)
            self._plans[number] = plan

    def _run(self, call: Call, group: dict[str, Any]) -> None:
        scaler: dict[str, Any] = {name: self._from_scaler(name, call.device) for name in ("grad_scale", "found_inf")}
        lists = call.lists(group["amsgrad"], bool(group["anchor"]))
        gk.masked_adam_(**lists, **_hyperparameters(group)._asdict(), **scaler)
        call.done()

    def _from_scaler(self, name: str, device: torch.device) -> Tensor | None:
        """The scalar that a GradScaler has set for this step."""
        scalar: Tensor | None = getattr(self, name, None)
        return None if scalar is None else scalar.to(device, torch.float32)

    def _calls(self, number: int, grads: list[Tensor | None]) -> list[Call]:
        group = self.param_groups[number]
        check_options(group)
        targets = [
            (n, target) for n, target in enumerate(self._targets(group)) if grads[n] is not None and target.mask.nnz
        ]
        refuse_sparse(grads[n] for n, _ in targets)  # type: ignore[misc]
        for _, target in targets:
            check_parameter(target.parameter, group["capturable"])
        seed = None
        if group["low_precision"] == "stochastic":  # a different one for each parameter, by its place in the optimizer
            seed = (group["seed"] << 32) + sum(len(earlier["params"]) for earlier in self.param_groups[:number])
        own = weakref.proxy(self)  # plans must not keep the optimizer, and with it the model, alive
        return calls_by_device(targets, lambda target: own._state(target, group), self._versions, seed)

    def _targets(self, group: dict[str, Any]) -> Iterator[Target]:
        for parameter in group["params"]:
            if parameter not in self._masks:
                if self._selection is not None:
                    raise KeyError(
                        f"a parameter of shape {list(parameter.shape)} was put into a group by hand, so it has no "
                        "mask; use add_param_group() or a new optimizer"
                    )
                self._masks[parameter] = Whole(parameter.shape)
            yield target_of(parameter, self._masks)

    def _state(self, target: Target, group: dict[str, Any]) -> State:
        """The state of a parameter, complete and up to date."""
        parameter = target.parameter
        state: State = self.state[parameter]
        complete(state, target, group, self._versions.get(parameter) != version_of(parameter))
        return state

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
        found = [
            (target, grad)
            for group in self.param_groups
            for target in self._targets(group)
            if (grad := target.parameter.grad) is not None and target.mask.nnz
        ]
        grads = [
            grad if target.is_compact or target.mask.is_whole else target.mask.gather(grad) for target, grad in found
        ]
        norm = get_total_norm(grads, norm_type, error_if_nonfinite)
        clip_grads_with_norm_([target.parameter for target, _ in found], max_norm, norm)
        return norm

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
        check_masks(selection)
        groups = [group for group in self.param_groups if not any(p in self._own_masks for p in group["params"])]
        if any(owner_of(parameter) is not None for group in groups for parameter in group["params"]):
            raise ValueError(
                "the model is attached; detach it, attach it with the new selection, and load dense_state_dict() into "
                "a new optimizer"
            )
        masks: dict[Tensor, Mask] = {}
        for group in groups:
            masks.update(bind(group, selection))
        states = {
            parameter: migrated(self.state[parameter], self._masks[parameter].to(parameter.device), mask, parameter)
            for parameter, mask in masks.items()
            if parameter in self.state
        }
        for parameter, state in states.items():
            if state:
                self.state[parameter] = state
            else:
                del self.state[parameter]
        self._selection = selection
        self._masks.update(masks)
        self._plans.clear()

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
        self.__setstate__(loaded(state_dict, self.param_groups, map(self._targets, self.param_groups)))
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
        self._plans, self._versions = {}, {}

    def __getstate__(self) -> dict[str, Any]:
        # Optimizer pickles and copies only its own three attributes. A copy without masks would train everything.
        own = {"_selection": self._selection, "_masks": self._masks, "_own_masks": self._own_masks}
        return {**super().__getstate__(), **own}
