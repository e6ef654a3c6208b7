"""What a rank hands to collectives, in bytes."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Operators of c10d and of functional collectives, by what they do.
_KINDS = {
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
    "allreduce_": "all-reduce",
    "all_reduce": "all-reduce",
    "broadcast_": "broadcast",
}
#: Which argument is the input.
_INPUT = {"_allgather_base_": 1, "allgather_": 1, "_reduce_scatter_base_": 1}


class Wire(TorchDispatchMode):
    """Counts inside a ``with`` block.

    Attributes:
        sent: bytes of the inputs of all collectives, by what these do.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func._overloadpacket.__name__
        if func.namespace in ("c10d", "_c10d_functional"):
            if name in _KINDS:
                given = [t for t in tree_leaves(args[_INPUT.get(name, 0)]) if isinstance(t, Tensor)]
                self.sent[_KINDS[name]] += sum(t.numel() * t.element_size() for t in given)
            elif name not in ("wait_tensor", "_wrap_tensor_autograd"):
                raise AssertionError(f"a collective that nobody counts: {name}")
        return func(*args, **(kwargs or {}))
