"""MaskedAdam: Adam on the selected entries, as a drop-in ``torch.optim.Optimizer``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

import gradsel_kernels as gk
from gradsel.links import owner_of, trained_dtype
from gradsel.masks import Mask, Operands, Whole
from gradsel.selection import Selection, lookup

_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


class MaskedAdam(Optimizer):
    """Adam (Kingma and Ba 2015) and AdamW (Loshchilov and Hutter 2019) that train only what a selection says.

    Argument order and defaults are those of :class:`torch.optim.Adam`; without ``masks`` it is Adam. With them,
    unselected entries never change by a bit, and the state has the size of the selection: two float32 (float64 for
    float64 parameters) for each selected entry, and a float32 master copy where the parameter is bfloat16 or float16.
    An anchor, of a group's own if it says so, holds the selected entries near their pre-trained values as GRFT does; it
    keeps these in the state, one more float32 (float64) for each entry.
    Weights written by others between steps are taken over, except through ``.data``, which nobody can see, and except
    in attached models, where the values count.
    The whole parameter group is updated by one kernel call; on a model prepared by :func:`gradsel.attach`, for which no
    ``masks`` are passed, that call writes values, moments and the weights themselves.

    Args:
        params: parameters, named parameters (``model.named_parameters()``, required with ``masks``) or groups.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the denominator.
        weight_decay: decay of the selected entries; an L2 term in the gradient unless ``decoupled_weight_decay``.
        amsgrad: use the running maximum of the second moment (Reddi et al. 2018).
        masks: a :class:`~gradsel.selection.Selection` keyed by parameter name; prefixes of DistributedDataParallel
            and torch.compile are looked through. Parameters it calls frozen are never touched.
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

    Raises:
        ValueError: a hyper-parameter out of range; ``masks`` with unnamed parameters; a mask of another shape.
        KeyError: a parameter that ``masks`` does not know.
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
        masks: Selection | None = None,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        anchor: float = 0.0,
        anchor_decoupled: bool = False,
        anchor_norm: int = 2,
    ) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if not lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        if not eps >= 0.0:
            raise ValueError(f"Invalid epsilon value: {eps}")
        for i, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
        if not weight_decay >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        if masks is not None and not isinstance(masks, Mapping):
            raise TypeError(
                f"masks must be a Selection, got {type(masks).__name__}; gradsel.select() makes one, "
                "Selection.from_dense() takes boolean tensors"
            )
        self._selection = masks
        self._masks: dict[Tensor, Mask] = {}
        self._versions: dict[Tensor, int] = {}  # of low-precision parameters, as of our last step
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "decoupled_weight_decay": decoupled_weight_decay,
            "anchor": anchor,
            "anchor_decoupled": anchor_decoupled,
            "anchor_norm": anchor_norm,
        }
        _check_anchor(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            _check_anchor(self.param_groups[-1])
            self._masks.update(self._bind(self.param_groups[-1]))
        except Exception:
            self.param_groups.pop()
            raise

    def _bind(self, group: dict[str, Any]) -> dict[Tensor, Mask]:
        """The mask of every parameter of a group."""
        params = group["params"]
        if self._selection is None:
            return {parameter: Whole(parameter.shape) for parameter in params}
        if any(owner_of(parameter) is not None for parameter in params):
            raise ValueError("the model is attached, so its parameters know what is selected; leave out masks")
        if "param_names" not in group:
            raise ValueError(
                "masks are keyed by parameter name, but the parameters have no names; "
                "pass model.named_parameters() instead of model.parameters()"
            )
        bound: dict[Tensor, Mask] = {}
        for name, parameter in zip(group["param_names"], params, strict=True):
            mask = lookup(self._selection, name)
            if not isinstance(mask, Mask):
                raise TypeError(
                    f"the mask of {name} is a {type(mask).__name__}; Selection.from_dense(masks) takes boolean tensors"
                )
            if mask.shape != tuple(parameter.shape):
                raise ValueError(
                    f"the mask of {name} is for shape {list(mask.shape)}, the parameter has {list(parameter.shape)}; "
                    "select on this model"
                )
            bound[parameter] = mask.to(parameter.device)
        return bound

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on every parameter that has a gradient.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What ``closure`` returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        operands: list[Operands] = []
        values: list[Tensor | None] = []  # compact parameters of an attached model
        states, low_precision = [], []
        for parameter in group["params"]:
            grad = parameter.grad
            mask = self._masks[parameter]
            if grad is None or mask.nnz == 0:
                continue
            if grad.is_sparse:
                raise RuntimeError("Adam does not support sparse gradients, please consider SparseAdam instead")
            if grad.is_complex():
                raise RuntimeError("MaskedAdam does not support complex parameters; use torch.view_as_real")
            owner = owner_of(parameter)
            kept = None
            if owner is None:
                operands.append(mask.operands(parameter, grad))
                values.append(None)
            else:
                weight, selected = owner
                weight, indices, layout = selected.mask.place(weight)
                operands.append(Operands(weight, grad, indices, layout))
                values.append(parameter)
                kept = selected.original
            states.append(self._state(parameter, mask, group, kept))
            if "master" in states[-1]:
                low_precision.append(parameter)
        if not operands:
            return
        beta1, beta2 = group["betas"]
        gk.masked_adam_(
            [o.weight for o in operands],
            [o.grad for o in operands],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["step"] for state in states],
            indices=[o.indices for o in operands],
            layouts=[o.layout for o in operands],
            values=[state.get("master", value) for state, value in zip(states, values, strict=True)],
            max_exp_avg_sqs=[state["max_exp_avg_sq"] for state in states] if group["amsgrad"] else None,
            originals=[state["original"] for state in states] if group["anchor"] else None,
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
        )
        for parameter in low_precision:
            self._versions[parameter] = parameter._version

    def _state(self, parameter: Tensor, mask: Mask, group: dict[str, Any], kept: Tensor | None) -> dict[str, Tensor]:
        """The state of a parameter, completed: all of it at first, a master after loading that of a float32 run.

        ``kept`` are the original values that attach() keeps of it; the state shares their memory where it can.
        """
        state: dict[str, Tensor] = self.state[parameter]
        dtype = trained_dtype(parameter)
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        for name in _MOMENTS if group["amsgrad"] else _MOMENTS[:2]:
            if name not in state:
                state[name] = torch.zeros(mask.compact_shape, dtype=dtype, device=parameter.device)
        if group["anchor"] and "original" not in state:
            state["original"] = (mask.gather(parameter) if kept is None else kept).to(dtype)
        if parameter.dtype != dtype:
            if "master" not in state:
                state["master"] = mask.gather(parameter).to(dtype)
            elif self._versions.get(parameter) != parameter._version:
                # Somebody else may have written the weight, a loaded checkpoint for example: what they wrote counts.
                written = mask.gather(parameter)
                theirs = written != state["master"].to(parameter.dtype)
                state["master"] = torch.where(theirs, written.to(dtype), state["master"])
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict` returned, in the dtypes it was saved in.

        Raises:
            ValueError: the state does not fit the masks, for example that of a dense Adam; nothing has changed.
        """
        saved_ids = list(chain.from_iterable(group["params"] for group in state_dict["param_groups"]))
        parameters = list(chain.from_iterable(group["params"] for group in self.param_groups))
        pairs = list(zip(saved_ids, parameters, strict=False))  # a wrong number is torch's error to report
        for number, (saved_id, parameter) in enumerate(pairs):
            mask = self._masks[parameter]
            for name, value in state_dict["state"].get(saved_id, {}).items():
                shape = tuple(torch.as_tensor(value).shape)
                if name != "step" and shape != mask.compact_shape:
                    raise ValueError(
                        f"{name} of parameter {number} has shape {list(shape)} in the state_dict, but the mask "
                        f"selects {list(mask.compact_shape)}; load the state of a run with the same selection"
                    )
        super().load_state_dict(state_dict)
        for saved_id, parameter in pairs:
            # Optimizer.load_state_dict casts to the parameter's dtype, which would cost bfloat16 runs their moments.
            for name, value in state_dict["state"].get(saved_id, {}).items():
                dtype = torch.float32 if name == "step" else trained_dtype(parameter)
                self.state[parameter][name] = torch.as_tensor(value).detach().to(parameter.device, dtype, copy=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for options in (self.defaults, *self.param_groups):  # an older version, or torch's Adam, had no anchor
            options.setdefault("anchor", 0.0)
            options.setdefault("anchor_decoupled", False)
            options.setdefault("anchor_norm", 2)

    def __getstate__(self) -> dict[str, Any]:
        # Optimizer takes three attributes through pickle and deepcopy; a copy without its masks would train everything.
        return {**super().__getstate__(), "_selection": self._selection, "_masks": self._masks, "_versions": {}}


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
        masks: Selection | None = None,
        maximize: bool = False,
        anchor: float = 0.0,
        anchor_decoupled: bool = False,
        anchor_norm: int = 2,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            masks=masks,
            maximize=maximize,
            decoupled_weight_decay=True,
            anchor=anchor,
            anchor_decoupled=anchor_decoupled,
            anchor_norm=anchor_norm,
        )


def _check_anchor(options: dict[str, Any]) -> None:
    if not options["anchor"] >= 0.0:
        raise ValueError(f"Invalid anchor value: {options['anchor']}")
    if options["anchor_norm"] not in (1, 2):
        raise ValueError(f"Invalid anchor_norm value: {options['anchor_norm']}; norms are 1 and 2")


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all tensors in an optimizer's state."""
    tensors: Iterable[Any] = chain.from_iterable(state.values() for state in optimizer.state.values())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, Tensor))
