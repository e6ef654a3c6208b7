"""The bare loop over selected entries, in C, that a step on dense gradients is measured against."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HUGE_PAGE = 1 << 21


class _Matrix(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "grad", "exp_avg", "exp_avg_sq", "cols")),
        *((name, ctypes.c_int64) for name in ("rows", "n", "k")),
    ]


@cache
def _library() -> ctypes.CDLL:
    """bare_loop.c, compiled for this machine."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "bare_loop.so"
        source = Path(__file__).with_name("bare_loop.c")
        subprocess.run(
            ["cc", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", str(source), "-o", str(library)], check=True
        )
        return ctypes.CDLL(str(library))


class BareLoop:
    """The loop on matrices of its own.

    Args:
        weights, grads: float32 [rows, n], contiguous.
        cols: int32 [rows, k], contiguous.
    """

    def __init__(self, weights: Sequence[Tensor], grads: Sequence[Tensor], cols: Sequence[Tensor]) -> None:
        moments = [torch.zeros(2, *index.shape) for index in cols]
        self._kept: Any = weights, grads, cols, moments
        self._matrices = (_Matrix * len(weights))(
            *(
                (w.data_ptr(), g.data_ptr(), m[0].data_ptr(), m[1].data_ptr(), c.data_ptr(), *w.shape, c.shape[1])
                for w, g, c, m in zip(weights, grads, cols, moments, strict=True)
            )
        )

    def __call__(self) -> None:
        _library().bare_loop(self._matrices, ctypes.c_int64(len(self._matrices)), torch.get_num_threads())


def on_huge_pages(rows: int, cols: int) -> Tensor:
    """Random numbers in memory for which huge pages are asked, as torch does with THP_MEM_ALLOC_ENABLE=1."""
    memory = mmap.mmap(-1, 4 * rows * cols + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    everything = torch.frombuffer(memory, dtype=torch.float32)
    first = -everything.data_ptr() % HUGE_PAGE // 4
    return everything[first : first + rows * cols].view(rows, cols).normal_()
