"""Inputs that every kernel test runs over: odd shapes, awkward values, strided views."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EMULATED = os.environ.get("GRADSEL_EMULATE_CUDA") == "1"
FOR_GPUS = INTERPRETED or EMULATED  # kernels for GPUs are under test, though tensors are on the CPU

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = [(1, 1), (0, 5), (5, 0), (1, 7), (3, 31), (5, 32), (7, 33), (16, 255), (9, 507), (33, 64)]
LONG_SHAPES = [(300, 768), (65, 4099), (5, 70001)]
if INTERPRETED:  # a program takes milliseconds there, so: the same kinds of shape, fewer rows
    SHAPES = [(1, 1), (0, 5), (5, 0), (3, 31), (5, 33), (2, 255)]
    LONG_SHAPES = [(2, 4099), (1, 20001)]
if EMULATED:  # a GPU's threads, one after the other
    LONG_SHAPES = [(30, 768), (6, 4099), (2, 70001)]


def normal(shape: tuple[int, int]) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def ties(shape: tuple[int, int]) -> Tensor:
    return torch.randint(-3, 4, shape).double()


def equal(shape: tuple[int, int]) -> Tensor:
    return torch.full(shape, -2.0, dtype=torch.float64)


def zeros(shape: tuple[int, int]) -> Tensor:
    return torch.where(torch.rand(shape) < 0.5, 0.0, -0.0).double()


def special(shape: tuple[int, int]) -> Tensor:
    """NaN, both infinities, both zeros and subnormals among ordinary numbers."""
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-42, -1e-42, 1.0, -1.0, 0.5])
    return values.double()[torch.randint(0, len(values), shape)]


def one_nan(shape: tuple[int, int]) -> Tensor:
    grad = normal(shape)
    if grad.numel():
        grad.view(-1)[grad.numel() // 2] = float("nan")
    return grad


VALUES = (normal, ties, equal, zeros, special, one_nan)


def contiguous(tensor: Tensor) -> Tensor:
    return tensor.clone()


def transposed(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous().t()


def spaced(tensor: Tensor) -> Tensor:
    """Neither rows nor columns adjoin in memory."""
    rows, cols = tensor.shape
    return torch.zeros((2 * rows, 3 * cols), dtype=tensor.dtype, device=tensor.device)[::2, ::3].copy_(tensor)


def offset(tensor: Tensor) -> Tensor:
    """Rows start at addresses that no vector load likes."""
    rows, cols = tensor.shape
    return torch.zeros((rows, cols + 3), dtype=tensor.dtype, device=tensor.device)[:, 1 : cols + 1].copy_(tensor)


VIEWS = (contiguous, transposed, spaced, offset)


def reserved(elements: int, device: str) -> Tensor:
    """float16 memory that is reserved, and used only where a test writes; without it the test is skipped."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        return torch.empty(elements, dtype=torch.float16, device=device)
    except RuntimeError as error:
        pytest.skip(f"{2 * elements / 2**30:.0f} GiB cannot be reserved here: {error}")


def ks(cols: int) -> list[int]:
    """Every kind of K for a row: one, few, around the algorithms' limits, whole, more than whole."""
    few = {1, 3, 8, 17, 150} if INTERPRETED else {1, 2, 3, 8, 17, 64, 150, max(1, cols - 1)}
    return sorted({*few, max(1, cols), cols + 3})


def random_mask(rows: int, cols: int, density: float = 0.3) -> Tensor:
    return torch.rand(rows, cols) < density


def random_cols(rows: int, cols: int, k: int) -> Tensor:
    return torch.rand(rows, cols).topk(min(k, cols), dim=1).indices.sort(dim=1).values.to(torch.int32)


def bits_of(tensor: Tensor) -> Tensor:
    """The bit patterns, so that -0.0 differs from 0.0 and NaN equals itself."""
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(sizes[tensor.element_size()])


def same_bits(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and left.dtype == right.dtype and torch.equal(bits_of(left), bits_of(right))
