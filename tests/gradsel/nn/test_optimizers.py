"""Any optimizer trains an attached model as it trains the plain one whose gradients are masked, in every setting."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradsel
from tests.support.selections import (
    KINDS,
    check_consistent,
    check_frozen,
    data,
    frozen_entries,
    mask_gradients,
    toy,
)
from tests.support.settings import SETTINGS, Setting
from tests.support.toy import cross_entropy

Make = Callable[[list], torch.optim.Optimizer]


@dataclass
class Case:
    """
    Attributes:
        make: makes the optimizer.
        plain: makes that of the plain model, if it is another one.
        together: it treats entries together, or changes those without a gradient (weight decay), so that it gives the
            selected entries other values in a matrix than by themselves.
    """

    make: Make
    plain: Make | None = None
    together: bool = False


ADAMW: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.0}
CASES = {
    "MaskedAdam": Case(lambda p: gradsel.MaskedAdam(p, lr=1e-2), lambda p: torch.optim.Adam(p, lr=1e-2)),
    "MaskedAdamW": Case(lambda p: gradsel.MaskedAdamW(p, lr=1e-2), lambda p: torch.optim.AdamW(p, lr=1e-2), True),
    "AdamW": Case(lambda p: torch.optim.AdamW(p, **ADAMW)),
    "AdamW, fused": Case(lambda p: torch.optim.AdamW(p, fused=True, **ADAMW)),
    "AdamW, foreach, amsgrad": Case(lambda p: torch.optim.AdamW(p, foreach=True, amsgrad=True, **ADAMW)),
    "AdamW, decay": Case(lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1), together=True),
    "NAdam": Case(lambda p: torch.optim.NAdam(p, lr=1e-2)),
    "RMSprop": Case(lambda p: torch.optim.RMSprop(p, lr=1e-2)),
    "SGD": Case(lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True)),
    "SGD, fused": Case(lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, fused=True)),
    "Adafactor": Case(lambda p: torch.optim.Adafactor(p, lr=1e-2, eps=(1e-6, 1e-3)), together=True),
    "LBFGS": Case(lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=4)),
    "LBFGS, line search": Case(lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=4, line_search_fn="strong_wolfe")),
    "Muon": Case(lambda p: torch.optim.Muon([each for each in p if each.ndim == 2], lr=1e-2, weight_decay=0.0)),
}
#: Values are no matrices to Muon, which warns.
COMBINATIONS = [(kind, name) for kind in KINDS for name in CASES if name != "Muon" or kind == "whole"]


class Plain:
    """A plain model that trains a selection by dense gradients.

    Args:
        model: changed in place.
        together: the optimizer gets parameters of the selected entries, in place of the model's with masked gradients.
    """

    def __init__(self, model: nn.Module, selection: gradsel.Selection, make: Make, together: bool) -> None:
        gradsel.freeze(model, selection)
        self.model, self.selection, self.together = model, selection, together
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.entries = {name: nn.Parameter(selection[name].gather(p.detach())) for name, p in self.trained.items()}
        self.optimizer = make(list((self.entries if together else self.trained).values()))

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Puts gradients where the optimizer looks for them."""
        self.write()
        self.model.zero_grad()
        loss = cross_entropy(self.model, batch)
        loss.backward()
        mask_gradients(self.model, self.selection)
        for name, parameter in self.trained.items() if self.together else ():
            self.entries[name].grad = None if parameter.grad is None else self.selection[name].gather(parameter.grad)
        return loss

    def write(self) -> None:
        for name, parameter in self.trained.items() if self.together else ():
            self.selection[name].scatter_(parameter.data, self.entries[name].detach())


@pytest.mark.supports("CPU", "attach", "MaskedAdam", "other optimizers", "merge")
@pytest.mark.parametrize(("kind", "name"), COMBINATIONS)
def test_equals_dense_training_with_masked_gradients(kind: str, name: str) -> None:
    case = CASES[name]
    model, selection = toy(kind, torch.float64)
    model.eval()
    dense = Plain(copy.deepcopy(model), selection, case.plain or case.make, case.together)
    before = frozen_entries(model, selection)
    gradsel.attach(model, selection)
    optimizer = case.make(gradsel.trainable_parameters(model))
    losses: tuple[list[float], list[float]] = ([], [])
    for batch in data(torch.float64):

        def loss(batch=batch) -> Tensor:
            optimizer.zero_grad()
            loss = cross_entropy(model, batch)
            loss.backward()
            losses[0].append(loss.item())
            return loss

        def dense_loss(batch=batch) -> Tensor:
            losses[1].append((loss := dense.loss(batch)).item())
            return loss

        optimizer.step(loss)
        dense.optimizer.step(dense_loss)
        check_consistent(model)
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)  # those of all points that LBFGS tries
    check_frozen(model, selection, before)
    dense.write()
    gradsel.detach(model)
    for (name, p), q in zip(model.named_parameters(), dense.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
    assert any((p != q).any() for p, q in zip(model.parameters(), toy()[0].double().parameters(), strict=True))


# --- Settings ----------------------------------------------------------------------------------------------------


def of_bitsandbytes(parameters: list) -> torch.optim.Optimizer:
    return pytest.importorskip("bitsandbytes").optim.AdamW8bit(parameters, lr=1e-2, min_8bit_size=4)


def of_torchao(parameters: list) -> torch.optim.Optimizer:
    return pytest.importorskip("torchao.optim").AdamW8bit(parameters, lr=1e-2, block_size=16)


MAKES: dict[str, Make] = {
    **{name: CASES[name].make for name in ("MaskedAdam", "AdamW, fused", "SGD", "LBFGS")},
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "AdamW8bit of bitsandbytes": of_bitsandbytes,
    "AdamW8bit of torchao": of_torchao,
}
#: The optimizers of parameters of their own, where they are others.
PLAIN: dict[str, Make] = {"MaskedAdam": lambda p: torch.optim.Adam(p, lr=1e-2)}


@pytest.mark.supports("autocast", "attach", "MaskedAdam", "other optimizers")
@pytest.mark.supports("bf16", "attach", "MaskedAdam", "other optimizers")
@pytest.mark.supports("fp16", "attach", "MaskedAdam", "other optimizers")
@pytest.mark.supports("torch.compile", "attach", "MaskedAdam", "other optimizers")
@pytest.mark.supports("offload", "attach", "MaskedAdam", "other optimizers")
@pytest.mark.parametrize("setting", SETTINGS)
def test_in_every_setting(setting: str) -> None:
    """Gradients are those of the plain model, a rounding apart, and a step is that of parameters of their own."""
    how = SETTINGS[setting]
    model, selection = toy(dtype=how.dtype)
    model.eval()
    dense = copy.deepcopy(model)
    gradsel.freeze(dense, selection)
    before = frozen_entries(model, selection)
    gradsel.attach(model, selection)
    start = copy.deepcopy(model.state_dict())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wrapped = how.wrap(model)
    for name, make in MAKES.items():
        if how.scale and name == "LBFGS":
            continue  # a GradScaler takes no closures
        model.load_state_dict(start)
        # MaskedAdam calculates in float32 also where parameters are in half precision, and torch's Adam does not.
        wide = torch.promote_types(how.dtype, torch.float32) if name == "MaskedAdam" else None
        own = {key: nn.Parameter(p.detach().to(wide or p.dtype, copy=True)) for key, p in trained.items()}
        optimizer, other = make(list(trained.values())), PLAIN.get(name, make)(list(own.values()))
        scaler = how.scaler()
        for batch in data(how.dtype):
            seen: list[tuple[Tensor, list[Tensor | None]]] = []

            def closure(batch=batch, optimizer=optimizer, scaler=scaler, seen=seen) -> Tensor:
                optimizer.zero_grad()
                with how.context():
                    loss = cross_entropy(wrapped, batch)
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                check_gradients(dense, selection, trained, batch, how)
                seen.append((loss.detach(), [None if p.grad is None else p.grad.clone() for p in trained.values()]))
                return loss

            def again(own=own, seen=seen) -> Tensor:
                loss, grads = seen.pop(0)
                for p, grad in zip(own.values(), grads, strict=True):
                    p.grad = None if grad is None else grad.to(p.dtype)
                return loss

            with torch.compiler.set_stance("force_eager") if "torchao" in name else nullcontext():
                if how.scale:
                    closure()
                    scaler.step(optimizer)
                    scaler.update()
                else:
                    optimizer.step(closure)
                other.step(again)
            check_consistent(model)
            for key, p in trained.items():
                if name == "MaskedAdam":
                    eps = torch.finfo(p.dtype).eps  # of the parameter, and of a step of 1e-2, which its moments make
                    torch.testing.assert_close(p, own[key].to(p.dtype), rtol=4 * eps, atol=1e-2 * 4 * eps)
                    own[key].data.copy_(p)
                assert torch.equal(p, own[key]), (name, key)
        assert any((p != start[key]).any() for key, p in trained.items()), name
    check_frozen(model, selection, before)


def check_gradients(
    dense: nn.Module, selection: gradsel.Selection, trained: dict[str, nn.Parameter], batch: Any, how: Setting
) -> None:
    """Those of a plain model with the same values, which lie in the gradients of its parameters."""
    plain = {name: p for name, p in dense.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in plain.items():
            values = trained[name if selection[name].is_whole else f"{name}_values"]
            selection[name].scatter_(parameter, values)
            parameter.grad = None
    with how.context():
        loss = cross_entropy(dense, batch)
    (loss * (how.scale or 1.0)).backward()
    for name, parameter in plain.items():
        grad = trained[name if selection[name].is_whole else f"{name}_values"].grad
        if parameter.grad is None or grad is None:
            assert parameter.grad is grad, name
            continue
        expected = selection[name].gather(parameter.grad).to(grad.dtype) / (how.scale or 1.0)
        largest = float(parameter.grad.abs().max()) / (how.scale or 1.0)
        torch.testing.assert_close(
            grad, expected, rtol=how.rtol, atol=how.atol * largest + how.least, msg=lambda m, name=name: f"{name}: {m}"
        )
