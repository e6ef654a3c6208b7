"""MaskedAdam: Adam on the selected entries, as a drop-in ``torch.optim.Optimizer``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.optim.optimizer import _get_capturable_supported_devices

import gradsel_kernels as gk
from gradsel.attached import owner_of
from gradsel.dtypes import trained_dtype
from gradsel.masks import Mask, Whole
from gradsel.optim.call import Call, Plan, Route, State, calls_by_device, refuse_sparse, route_of, version_of
from gradsel.optim.groups import (  # fmt: skip
    bind,
    check_anchor,
    check_masks,
    check_options,
    check_sizes,
    check_tensors,
    complete_options,
    plain_name,
    warn_of_rounded_moments,
)
from gradsel.optim.state import FINGERPRINT, MOMENTS, dense, fingerprint, fitted, is_dense, migrated
from gradsel.selection.selection import Selection

#: Options of a group that decide which tensors its kernel calls take.
_OF_PLANS = ("amsgrad", "capturable", "differentiable", "low_precision", "seed", "state_dtype")


class MaskedAdam(Optimizer):
    """Adam (Kingma and Ba 2015) and AdamW (Loshchilov and Hutter 2019) that train only what a selection says.

    Argument order, defaults and behaviour are those of :class:`torch.optim.Adam`; without ``masks`` it is Adam. With
    them, unselected entries never change by a bit, and the state has the size of the selection: two float32 (float64
    for float64 parameters) for each selected entry, and a float32 master copy where the parameter is bfloat16 or
    float16.
    An anchor, of a group's own if it says so, holds the selected entries near their pre-trained values as GRFT does; it
    keeps these in the state, one more float32 (float64) for each entry.
    Weights written by others between steps are taken over, except in place through ``.data``, which nobody can see, and
    except in attached models, where the values count.
    The whole parameter group is updated by one kernel call; on a model prepared by :func:`gradsel.attach`, for which no
    ``masks`` are passed, that call writes values, moments and the weights themselves.

    Args:
        params: parameters, named parameters (``model.named_parameters()``, required with ``masks``) or groups. A group
            may have ``"masks"`` of its own in place of the argument's; None trains it whole.
        lr: learning rate; a 1-element tensor is read at every step, which waits for its device.
        betas: decay rates of the two moments; floats or 1-element tensors.
        eps: added to the denominator.
        weight_decay: decay of the selected entries; an L2 term in the gradient unless ``decoupled_weight_decay``.
        amsgrad: use the running maximum of the second moment (Reddi et al. 2018).
        masks: a :class:`~gradsel.selection.Selection`, or a dict of masks, keyed by parameter name; prefixes of
            DistributedDataParallel and torch.compile are looked through. Parameters it calls frozen are never touched.
        foreach: recorded in the groups as torch does. There is one implementation, the fused one, whatever it says.
        fused: likewise; but True, as in torch, lets a :class:`torch.amp.GradScaler` leave unscaling and skipping to the
            kernel, which spares the host a synchronisation.
        capturable: accepted on devices that torch allows it on. A step can be captured in a CUDA graph by the backend
            ``"cuda"`` of gradsel_kernels, with the hyperparameters it then has; Triton's refuses.
        differentiable: must be False: the kernels write in place.
        maximize: ascend.
        decoupled_weight_decay: decay as in AdamW.
        anchor: strength of the pull of selected entries towards their original values: ``anchor * ||w - w_pre||_2^2``
            is added to the loss ("Gradient-based and Regularized Fine-Tuning", under review 2026, Alg. 1 line 8), so
            ``2 * anchor * (w - w_pre)`` to the gradient, after that of weight decay, also with ``maximize``. Originals
            are the values at attach() where a model is attached; elsewhere, heads and biases trained whole included,
            those that the weights have at the first step with an anchor, so that a checkpoint may be loaded in
            between. A schedule that raises ``anchor`` from 0 later anchors to the weights of then. They are in the
            state_dict, and a resumed run keeps them.
        anchor_decoupled: the pull moves the entries themselves ahead of Adam, after decoupled weight decay, and does
            not enter the moments: ``w -= 2 * lr * anchor * (w - w_pre)``, which wants ``lr * anchor`` below 1/2.
        anchor_norm: 2, or 1 for ``anchor * ||w - w_pre||_1``: a gradient of ``anchor * sign(w - w_pre)``, or decoupled
            a step of ``lr * anchor`` towards the original that ends there (soft thresholding).
        low_precision: what keeps the small steps of weights in bfloat16 and float16, of which 8 or 11 digits remain:
            ``"master"``, a float32 copy of the selected entries, 4 bytes each; ``"kahan"``, what rounding left behind,
            in the dtype of the weight, 2 bytes each; ``"stochastic"``, rounding up or down at random so that the mean
            is right, no bytes. The values of an attached model are float32 and need none of them.
        seed: of stochastic rounding, 0 to 2**31 - 1. A resumed run draws what it would have drawn.
        state_dtype: of the moments: None for float32 (float64 for float64 parameters), or ``torch.bfloat16``, which
            halves them and rounds them at every step. Use betas up to 0.99 with it: above, second moments never fall.

    Raises:
        ValueError: a hyper-parameter out of range; ``masks`` with unnamed parameters; a mask of another shape;
            ``differentiable``.
        TypeError: ``masks`` that are none.
        KeyError: a parameter that ``masks`` does not know.
        RuntimeError: ``fused`` and ``foreach`` together.
    """

    #: attach()'s hook for other optimizers has nothing left to do after a step.
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
        check_tensors({"lr": lr}, bool(foreach) and not capturable)
        if not lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        if not eps >= 0.0:
            raise ValueError(f"Invalid epsilon value: {eps}")
        for i, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
        if not weight_decay >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        if isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor):
            raise ValueError("betas must be either both floats or both Tensors")
        check_tensors({"betas[0]": betas[0], "betas[1]": betas[1]}, bool(foreach) and not capturable)
        if fused and differentiable:
            raise RuntimeError("`fused` does not support `differentiable`")
        if fused and foreach:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        check_masks(masks)
        self._selection = masks
        self._masks: dict[Tensor, Mask] = {}
        self._own_masks: dict[Tensor, Mask] = {}  # those that a group brought along
        # Versions and addresses of low-precision parameters, as of our last step.
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
        check_options(defaults)
        super().__init__(params, defaults)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether GradScaler sets ``grad_scale`` and ``found_inf`` and leaves the rest to :meth:`step`.

        As torch's Adam only where asked for: Lightning, for one, then refuses to clip gradients.
        """
        return bool(self.defaults.get("fused"))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; the group may have ``"masks"`` of its own, and is left out if they do not fit."""
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
        """Under torch.compile it is a graph break: one kernel call has nothing to fuse, and plans guard themselves."""
        for number, group in enumerate(self.param_groups):
            grads = [parameter.grad for parameter in group["params"]]
            options = (bool(group["anchor"]), *map(group.__getitem__, _OF_PLANS))
            plan = self._plans.get(number)
            if plan is None or not plan.holds(group["params"], grads, options, self.state):
                plan = Plan(group["params"], grads, options, self._calls(number, grads), self.state)
                self._plans[number] = plan
            check_anchor(group)
            for call in plan.calls:
                self._run(call, group, grads)

    def _run(self, call: Call, group: dict[str, Any], grads: list[Tensor | None]) -> None:
        beta1, beta2 = group["betas"]
        try:
            gk.masked_adam_(
                **call.lists(grads, group["amsgrad"], bool(group["anchor"])),
                lr=float(group["lr"]),
                beta1=float(beta1),
                beta2=float(beta2),
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                decoupled_weight_decay=group["decoupled_weight_decay"],
                maximize=group["maximize"],
                anchor=float(group["anchor"]),
                anchor_l1=group["anchor_norm"] == 1,
                anchor_decoupled=group["anchor_decoupled"],
                grad_scale=self._from_scaler("grad_scale", call.device),
                found_inf=self._from_scaler("found_inf", call.device),
            )
        except (TypeError, ValueError, RuntimeError):
            # The likely reason, in torch's words; looking ahead of every step would take its time.
            refuse_sparse(grads[number] for number in call.numbers)  # type: ignore[misc]
            raise
        call.done()

    def _from_scaler(self, name: str, device: torch.device) -> Tensor | None:
        """What a GradScaler has set for this step."""
        scalar: Tensor | None = getattr(self, name, None)
        return None if scalar is None else scalar.to(device, torch.float32)

    def _calls(self, number: int, grads: list[Tensor | None]) -> list[Call]:
        group = self.param_groups[number]
        check_options(group)
        routes = [(n, route) for n, route in enumerate(self._routes(group)) if grads[n] is not None and route.mask.nnz]
        refuse_sparse(grads[n] for n, _ in routes)  # type: ignore[misc]
        for _, route in routes:
            if route.parameter.is_complex():
                raise RuntimeError("MaskedAdam does not support complex parameters; use torch.view_as_real")
            if group["capturable"] and route.parameter.device.type not in _get_capturable_supported_devices():
                raise AssertionError(
                    "If capturable=True, params and state_steps must be on supported devices: "
                    f"{_get_capturable_supported_devices()}."
                )
        seed = None
        if group["low_precision"] == "stochastic":  # another one for each parameter, by its place in the optimizer
            seed = (group["seed"] << 32) + sum(len(earlier["params"]) for earlier in self.param_groups[:number])
        return calls_by_device(routes, lambda route: self._state(route, group), self._versions, seed)

    def _routes(self, group: dict[str, Any]) -> Iterator[Route]:
        for parameter in group["params"]:
            if parameter not in self._masks:
                if self._selection is not None:
                    raise KeyError(
                        f"a parameter of shape {list(parameter.shape)} was put into a group by hand, so it has no "
                        "mask; use add_param_group() or a new optimizer"
                    )
                self._masks[parameter] = Whole(parameter.shape)
            yield route_of(parameter, self._masks)

    def _state(self, route: Route, group: dict[str, Any]) -> State:
        """The state of a parameter, completed: all of it at first, a master after loading that of a float32 run.

        Originals that attach() keeps share their memory with the state where they can.
        """
        parameter, _, mask, kept = route
        state: State = self.state[parameter]
        dtype = trained_dtype(parameter)
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        moments = dtype if dtype is torch.float64 else group["state_dtype"] or dtype
        for name in MOMENTS if group["amsgrad"] else MOMENTS[:2]:
            if name not in state:
                state[name] = torch.zeros(mask.compact_shape, dtype=moments, device=parameter.device)
            elif state[name].dtype != moments:  # the option was another one
                state[name] = state[name].to(moments)
        if FINGERPRINT not in state and not mask.is_whole:
            state[FINGERPRINT] = fingerprint(mask)
        if group["anchor"] and "original" not in state:
            state["original"] = (mask.gather(parameter) if kept is None else kept).to(dtype)
        if "original" in state and state["original"].dtype != dtype:  # the model was cast
            state["original"] = state["original"].to(dtype)
        if parameter.dtype != dtype:
            self._keep_digits(state, parameter, mask, group["low_precision"])
        else:
            for name in ("master", "compensation"):
                state.pop(name, None)
        return state

    def _keep_digits(self, state: State, parameter: Tensor, mask: Mask, how: str) -> None:
        """Completes what stands by a weight in low precision, and drops what another ``how`` has left."""
        digits = trained_dtype(parameter)
        left = state.get("compensation")
        if how != "kahan":
            state.pop("compensation", None)
        if how != "master":
            master = state.pop("master", None)
            if how == "kahan" and (left is None or left.dtype != parameter.dtype):
                weight = mask.gather(parameter)
                trained = weight.to(digits) if master is None else master
                state["compensation"] = (trained - weight.to(digits)).nan_to_num(0.0, 0.0, 0.0).to(parameter.dtype)
        elif "master" not in state:
            state["master"] = mask.gather(parameter).to(digits)
            if left is not None:
                state["master"] += left
        elif self._versions.get(parameter) != version_of(parameter):
            # Somebody else may have written the weight, a loaded checkpoint for example: what they wrote counts.
            written = mask.gather(parameter)
            ours = state["master"].to(parameter.dtype)
            theirs = (written != ours) & ~(written.isnan() & ours.isnan())
            state["master"] = torch.where(theirs, written.to(digits), state["master"])

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
        """Clips the norm of the gradients of all selected entries, taken as one vector.

        :func:`torch.nn.utils.clip_grad_norm_` would count the gradients of frozen entries too, and clip more. On models
        prepared by :func:`gradsel.attach` there are none, and the two are the same.

        Args:
            max_norm: the largest norm that is left as it is.
            norm_type: may be ``"inf"`` or any number.
            error_if_nonfinite: raise if the norm is NaN or infinite.

        Returns:
            The norm before, a scalar.

        Raises:
            RuntimeError: the norm is not finite, and ``error_if_nonfinite``.
        """
        found = [
            (route, grad)
            for group in self.param_groups
            for route in self._routes(group)
            if (grad := route.parameter.grad) is not None and route.mask.nnz
        ]
        grads = [grad if route.is_compact or route.mask.is_whole else route.mask.gather(grad) for route, grad in found]
        norm = get_total_norm(grads, norm_type, error_if_nonfinite)
        clip_grads_with_norm_([route.parameter for route, _ in found], max_norm, norm)
        return norm

    @torch.no_grad()
    def reselect(self, selection: Selection | Mapping[str, Mask]) -> None:
        """Goes on with other masks, for all groups but those that brought masks of their own.

        Entries that stay selected keep their state bit for bit, and the step count of their parameter; entries that
        come in have moments of zero, and are anchored to their values of now; those that leave are frozen as they are.

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

        A state of ``torch.optim.Adam`` or ``AdamW`` for the same parameters is taken too: a dense run goes on as a
        masked one, with the moments of the selected entries, and with the options of ours that it lacks. Where both
        optimizers have names of parameters, these say what belongs together, else the order; a dense state for an
        attached model needs them.

        Args:
            state_dict: nothing of it is shared.

        Raises:
            ValueError: other groups, or a state trained with another selection; nothing has changed.
        """
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = before(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        # From here on as Optimizer.load_state_dict, which would round moments to the dtype of the parameter.
        saved_groups = deepcopy(state_dict["param_groups"])
        check_sizes(self.param_groups, saved_groups)
        routes: dict[Any, tuple[Route, str]] = {}
        for group, saved in zip(self.param_groups, saved_groups, strict=True):
            routes.update(zip(saved["params"], self._in_order_of(saved, group, state_dict["state"]), strict=True))
        state: defaultdict[Any, Any] = defaultdict(dict)
        for key, saved in state_dict["state"].items():
            if key not in routes:
                state[key] = deepcopy(saved)
            elif found := fitted(saved, *routes[key]):
                state[routes[key][0].parameter] = found
        for group, saved in zip(self.param_groups, saved_groups, strict=True):
            if _by_name(saved, group):
                saved["param_names"] = group["param_names"]
            elif "param_names" in group:
                saved.setdefault("param_names", group["param_names"])
            saved["params"] = group["params"]
            complete_options(saved, group)
        self.__setstate__({"state": state, "param_groups": saved_groups})
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _in_order_of(
        self, saved: dict[str, Any], group: dict[str, Any], states: Mapping[Any, Any]
    ) -> list[tuple[Route, str]]:
        """The named routes of a group in the order of a saved one: by name where both have names, else by place."""
        routes = list(self._named_routes(group))
        if names := _by_name(saved, group):
            by_name = dict(zip(map(plain_name, group["param_names"]), routes, strict=True))
            return [by_name[name] for name in names]
        for key, (route, name) in zip(saved["params"], routes, strict=True):
            if route.is_compact and is_dense(states.get(key), route.mask):
                raise ValueError(
                    f"{name} belongs to an attached model, which takes a dense state by name only, because attach() "
                    "orders parameters anew: give names to both optimizers, as in "
                    "[(name, p) for name, p in model.named_parameters() if p.requires_grad]"
                )
        return routes

    def _named_routes(self, group: dict[str, Any]) -> Iterator[tuple[Route, str]]:
        """With the names of parameters; without names their numbers in the group."""
        names = group.get("param_names") or [f"parameter {number}" for number in range(len(group["params"]))]
        for route, name in zip(self._routes(group), names, strict=True):
            owner = owner_of(route.parameter)
            yield route, name if owner is None else owner[1].name

    @torch.no_grad()
    def dense_state_dict(self) -> dict[str, Any]:
        """A state_dict for ``torch.optim.Adam``: moments in the shape of the parameters, zero at frozen entries.

        The parameters are this optimizer's, in their order; for values of an attached model, their weights. The
        moments are float32 (float64), and nothing is shared. Masters and originals are left out.
        """
        parameters = list(chain.from_iterable(group["params"] for group in self.param_groups))
        numbers = {parameter: number for number, parameter in enumerate(parameters)}
        routes = (route_of(parameter, self._masks) for parameter in parameters if parameter in self.state)
        state = {numbers[route.parameter]: dense(self.state[route.parameter], route.mask) for route in routes}
        groups = [{**group, "params": [numbers[p] for p in group["params"]]} for group in self.param_groups]
        for group in groups:
            if "param_names" in group:
                group["param_names"] = [plain_name(name) for name in group["param_names"]]
        return {"state": state, "param_groups": deepcopy(groups)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for options in (self.defaults, *self.param_groups):
            complete_options(options)
        for parameter, own in self.state.items():
            if "step" in own and not isinstance(own["step"], Tensor):  # of torch before 1.12
                own["step"] = torch.tensor(float(own["step"]), device=parameter.device)
        self._plans, self._versions = {}, {}

    def __getstate__(self) -> dict[str, Any]:
        # Optimizer takes three attributes through pickle and deepcopy; a copy without its masks would train everything.
        own = {"_selection": self._selection, "_masks": self._masks, "_own_masks": self._own_masks}
        return {**super().__getstate__(), **own}


def _by_name(saved: dict[str, Any], group: dict[str, Any]) -> list[str] | None:
    """The plain names of a saved group, if they are those of the group in any order."""
    if "param_names" not in saved or "param_names" not in group:
        return None
    names, own = ([plain_name(name) for name in each["param_names"]] for each in (saved, group))
    return names if len(set(own)) == len(own) and set(names) == set(own) else None


class MaskedAdamW(MaskedAdam):
    """:class:`MaskedAdam` with the defaults of :class:`torch.optim.AdamW`: decoupled weight decay of 0.01."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        masks: Selection | Mapping[str, Mask] | None = None,
        anchor: float = 0.0,
        anchor_decoupled: bool = False,
        anchor_norm: int = 2,
        low_precision: str = "master",
        seed: int = 0,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            masks=masks,
            anchor=anchor,
            anchor_decoupled=anchor_decoupled,
            anchor_norm=anchor_norm,
            low_precision=low_precision,
            seed=seed,
            state_dtype=state_dtype,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # whatever a loaded state_dict says, as in torch
            group["decoupled_weight_decay"] = True


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all tensors in an optimizer's state."""
    tensors: Iterable[Any] = chain.from_iterable(state.values() for state in optimizer.state.values())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, Tensor))
