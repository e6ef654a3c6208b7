"""Launches with other numbers, sizes and shapes compile nothing new."""

from __future__ import annotations

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

from gradsel_kernels._checks import Layout
from gradsel_kernels.adam_call import records
from gradsel_kernels.triton import adam, device_tables, weight_grad
from tests.triton_compile.cases import HOPPER, jit_functions


class NoDevice:
    """The part of a driver that a launch needs if it only compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", HOPPER, 32)


@pytest.fixture
def compilations(monkeypatch):
    """The names of the kernels that launches had to compile; launches compile but run nothing."""
    found = []
    launch = triton.runtime.JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        known = sum(len(caches[0]) for caches in self.device_caches.values())
        launch(self, *args, grid=grid, warmup=True, **options)
        found.extend([self.__name__] * (sum(len(caches[0]) for caches in self.device_caches.values()) - known))

    monkeypatch.setattr(triton.runtime.JITFunction, "run", compile_only)
    monkeypatch.setattr(triton.runtime.driver, "_active", NoDevice())
    forget_compiled()
    yield found
    forget_compiled()


def forget_compiled() -> None:
    """On a GPU, kernels compiled earlier would count as known, and kernels compiled here would run later."""
    for function in jit_functions().values():
        function.device_caches.clear()
    device_tables._load_writer.cache_clear()


def call(lr: float, count: int, rows: int, rates: torch.Tensor | None = None):
    """The records of a step of tensors in half precision."""

    def zeros() -> list[torch.Tensor]:
        return [torch.zeros(rows, 8) for _ in range(count)]

    return records(
        [torch.zeros(rows, 48).half() for _ in range(count)], [], zeros(), zeros(), zeros(), [], zeros(),
        [torch.zeros(()) for _ in range(count)],
        [torch.zeros(rows, 8, dtype=torch.int32) for _ in range(count)],
        [Layout.COLS] * count,
        lr=lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, decoupled_weight_decay=False, maximize=False,
        anchor=lr + 1, anchor_l1=False, anchor_decoupled=False,
        grad_scale=torch.full((), lr), found_inf=torch.full((), lr), rates=rates,
        seeds=[int(2.0**40 * lr)] * count, stochastic=[True] * count,
    )  # fmt: skip


def test_a_new_step_compiles_nothing(compilations):
    """Learning rates, step counts, and the number and sizes of tensors are data."""

    def step(lr: float, count: int, rows: int) -> None:
        adam.masked_adam_(*call(lr, count, rows))

    step(1e-3, 3, 32)
    assert compilations == ["advance", "step"]
    for lr, count, rows_ in ((1.0, 1, 32), (0.0, 16, 64), (16.0, 17, 1000)):
        step(lr, count, rows_)
    assert compilations == ["advance", "step"]


@pytest.mark.parametrize("with_rates", [False, True])
def test_a_captured_step_compiles_nothing(compilations, monkeypatch, with_rates):
    """A capture does not allow to load a kernel. Another is used only for gradients that lie elsewhere."""
    rates = torch.zeros(3, dtype=torch.float64) if with_rates else None
    known = {count: call(1e-3, count, 32, rates) for count in (1, 33)}
    for tensors, options in known.values():
        adam.masked_adam_(tensors, options)
    device_tables._load_writer(torch.device("cpu"))
    assert compilations == ["advance", "step", "_write_addresses"]
    monkeypatch.setattr(device_tables, "is_capturing", lambda device: True)
    for tensors, options in known.values():
        adam.masked_adam_(tensors, options)
        elsewhere = tensors._replace(grads=[grad.clone() for grad in tensors.grads])
        adam.masked_adam_(elsewhere, options._replace(lr=0.5))
    assert compilations == ["advance", "step", "_write_addresses"]


@pytest.mark.parametrize(("strategy", "kernel"), [("gather", "_gather"), ("tile", "_tile")])
def test_other_shapes_compile_nothing(compilations, strategy, kernel):
    """Nor do other numbers of entries, except for tiles of one or two entries per row."""

    def gradients(tokens: int, rows: int, n: int, k: int) -> None:
        grad_output, saved = torch.zeros(tokens, rows), torch.zeros(n, tokens)
        cols = torch.zeros((rows, k), dtype=torch.int32)
        weight_grad.selected_weight_grad_bias(grad_output, saved.mT, cols, None, strategy)

    for shape in ((64, 48, 160, 5), (512, 80, 176, 16), (2048, 320, 1600, 9)):
        gradients(*shape)
    assert compilations == [kernel]
