"""Kernels for gradient-based sparse fine-tuning: per-row top-K selection, bitmask packing, selected
weight gradients, products with selected entries, masked Adam.

Every operation takes 2-D neuron views (one row per output neuron) and runs on four backends: ``reference`` (plain
torch, the specification), ``native`` (C++, for CPU tensors), ``triton`` and ``cuda`` (CUDA C++, both for CUDA tensors).
The device decides; :func:`use_backend` overrides the choice.
"""

from gradsel_kernels._checks import Layout
from gradsel_kernels._version import __version__
from gradsel_kernels.adam import masked_adam_
from gradsel_kernels.backends import show_config, use_backend
from gradsel_kernels.bitmask import pack_bits, unpack_bits
from gradsel_kernels.product import selected_addmm_
from gradsel_kernels.rows import gather_rows, scatter_rows_
from gradsel_kernels.topk import topk_rows, topk_rows_bits
from gradsel_kernels.topk_adam import FirstStep, topk_masked_adam_
from gradsel_kernels.weight_grad import selected_weight_grad, selected_weight_grad_bias, take_columns

__all__ = [
    "FirstStep",
    "Layout",
    "__version__",
    "gather_rows",
    "masked_adam_",
    "pack_bits",
    "scatter_rows_",
    "selected_addmm_",
    "selected_weight_grad",
    "selected_weight_grad_bias",
    "show_config",
    "take_columns",
    "topk_masked_adam_",
    "topk_rows",
    "topk_rows_bits",
    "unpack_bits",
    "use_backend",
]
