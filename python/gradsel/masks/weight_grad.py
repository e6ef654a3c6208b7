"""How the selected entries of a weight gradient are computed, what forward has to keep for it, and their product.

A :class:`Product` serves layers that multiply by their weight (Linear, Conv), a :class:`Lookup` embeddings. Masks make
them (:meth:`gradsel.masks.Mask.product`, :meth:`~gradsel.masks.Mask.lookup`) and the autograd functions use them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import gradsel_kernels as gk
from gradsel.dtypes import trained_dtype

#: Stride, padding and dilation of a convolution, one number for each dimension of its kernel.
Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]

#: If more than this share of an input is used, forward keeps a reference to the input instead of copying the used part:
#: sibling layers (query, key and value) may hold the same input, and then it costs nothing.
COPIED_SHARE = 0.5


def once(backward: Callable) -> Callable:
    """Makes it an error to differentiate the backward of an autograd function.

    Torch's ``once_differentiable`` puts the error where ``autograd.grad`` with respect to inputs does not go: Hessians
    and their products with vectors would lack a part.
    """

    @wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        if torch.compiler.is_compiling():
            return backward(ctx, *map(_without_history, grads))
        if torch.is_grad_enabled():
            raise RuntimeError(_TWICE)
        return backward(ctx, *grads)

    return checked


_TWICE = (
    "gradients of an attached model cannot be differentiated again (create_graph=True, as for Hessians and gradient "
    "penalties): for those, call gradsel.detach(model) first"
)


@torch.compiler.allow_in_graph
def _without_history(grad: Tensor) -> Tensor:
    """The same gradient, which ``backend="eager"`` may differentiate again; other backends of torch.compile refuse.

    Compiled backwards have no grad mode to ask. Tracing, whose fake tensors may require grad, leaves no node of it.
    """
    if type(grad) is Tensor and grad.requires_grad:
        raise RuntimeError(_TWICE)
    return grad


class _Movable:
    """Dataclasses of tensors and plain values, moved together."""

    def to(self, device: torch.device, shared: Sequence[tuple[Tensor, Tensor]] = ()):
        """The same on ``device``.

        Args:
            shared: tensors that it holds together with others, and what these hold on ``device``.
        """
        there = {id(before): after for before, after in shared}
        held = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        moved = {
            name: there[id(each)] if id(each) in there else each.to(device)
            for name, each in held.items()
            if isinstance(each, Tensor)
        }
        return replace(self, **moved)  # type: ignore[type-var]


@dataclass(frozen=True, eq=False)
class Product(_Movable):
    """The selected entries of ``grad_output.T @ input``.

    Attributes:
        inputs: number of input columns; for a grouped convolution, of all groups together.
        used: int32, ascending: the columns that forward copies because some entry reads them. None: forward keeps the
            whole input.
        cols: int32 [rows, k] or [nnz], the column of each entry, as a position in ``used`` unless there are ``places``.
        shape: shape of the result.
        places: int32 [inputs], the position in ``used`` of each column, where ``cols`` are a mask's own, which has them
            anyway. None: ``cols`` are positions.
        row_offsets: for ``cols`` [nnz], where each row begins: int64 [rows + 1].
        rows: int64, the only rows with selected entries. None: all rows have some.
        order: int64 [nnz]: entry i of the mask is entry ``order[i]`` of the product. None: the order is the same.
        rows_are_inputs: the two factors, and with them rows and columns, are swapped (for whole rows: a product with
            few rows is cheapest when computed as one with few columns).
    """

    inputs: int
    used: Tensor | None
    cols: Tensor
    shape: tuple[int, ...]
    places: Tensor | None = None
    row_offsets: Tensor | None = None
    rows: Tensor | None = None
    order: Tensor | None = None
    rows_are_inputs: bool = False

    @staticmethod
    def per_row(
        cols: Tensor, inputs: int, shape: tuple[int, ...], share: float = COPIED_SHARE, rows: Tensor | None = None
    ) -> Product:
        """From the input column of every entry, [rows, k]. If more than ``share`` are used, ``used`` is None."""
        used, cols = _compacted(cols, inputs, share)
        return Product(inputs, used, cols, shape, rows=rows)

    @staticmethod
    def of_columns(cols: Tensor, inputs: int, share: float = COPIED_SHARE) -> Product:
        """From the columns of a mask, int32 [rows, k], which it shares."""
        used, places = _used(cols, inputs, share), None
        if used is not None:
            places = torch.zeros(inputs, dtype=torch.int32, device=cols.device)
            places[used] = torch.arange(used.numel(), dtype=torch.int32, device=cols.device)
            used = used.to(torch.int32)
        return Product(inputs, used, cols, tuple(cols.shape), places)

    @staticmethod
    def whole_rows(rows: Tensor, inputs: int) -> Product:
        """From the numbers of the rows that are selected whole."""
        positions = torch.arange(rows.numel(), dtype=torch.int32, device=rows.device)
        shape = (rows.numel(), inputs)
        cols = positions.repeat(inputs, 1)
        return Product(inputs, None, cols, shape, rows=rows.long(), rows_are_inputs=True)

    @staticmethod
    def irregular(row: Tensor, col: Tensor, rows: int, inputs: int, share: float = COPIED_SHARE) -> Product:
        """From the row and the input column of every entry, each int64 [nnz], in mask order."""
        order = None
        if bool((row.diff() < 0).any()):
            sorting = row.argsort(stable=True)
            order = torch.empty_like(sorting).scatter_(0, sorting, torch.arange(sorting.numel(), device=row.device))
            row, col = row[sorting], col[sorting]
        offsets = torch.zeros(rows + 1, dtype=torch.int64, device=row.device)
        torch.cumsum(torch.bincount(row, minlength=rows), 0, out=offsets[1:])
        used, cols = _compacted(col, inputs, share)
        return Product(inputs, used, cols, (cols.numel(),), row_offsets=offsets, order=order)

    def keep(self, input: Tensor) -> Tensor:
        """What backward needs of ``input`` [tokens, inputs]: a copy [used, tokens] of the used columns, or all."""
        return input if self.used is None else gk.take_columns(input, self.used)

    def factor(self, kept: Tensor) -> Tensor:
        """The factor [tokens, used] of the product, from what :meth:`keep` returned."""
        return kept if self.used is None else kept.mT

    def weight_grad(self, grad_output: Tensor, factor: Tensor, bias: bool) -> tuple[Tensor, Tensor | None]:
        """The selected entries in mask order and, with ``bias``, the sum of ``grad_output`` over its tokens.

        Args:
            grad_output: [tokens, rows] or [batch, tokens, rows].
            factor: [tokens, used] or [batch, tokens, used], of the same dtype.
        """
        if self.rows is None:
            cols = (
                self.cols if self.places is None else self.places.index_select(0, self.cols.view(-1)).view(self.shape)
            )
            if bias:
                grad, bias_grad = gk.selected_weight_grad_bias(grad_output, factor, cols, row_offsets=self.row_offsets)
            else:
                grad = gk.selected_weight_grad(grad_output, factor, cols, row_offsets=self.row_offsets)
                bias_grad = None
        else:
            few = grad_output.index_select(-1, self.rows)
            if self.rows_are_inputs:
                grad = gk.selected_weight_grad(factor, few, self.cols).mT
            else:
                grad = gk.selected_weight_grad(few, factor, self.cols)
            tokens = tuple(range(grad_output.ndim - 1))
            bias_grad = grad_output.sum(tokens, dtype=grad.dtype) if bias else None
        if self.order is not None:
            grad = grad[self.order]
        return grad.reshape(self.shape), bias_grad

    def add_to(self, output: Tensor, input: Tensor, values: Tensor) -> None:
        """Adds what the selected entries contribute to a layer's output, in place.

        Args:
            output: [tokens, rows].
            input: [tokens, inputs], of the same dtype.
            values: the entries in mask order, in float32 (float64 for float64).
        """
        if self.rows_are_inputs:
            assert self.rows is not None
            output.index_add_(1, self.rows, (input.to(values.dtype) @ values.mT).to(output.dtype))
            return
        if self.order is not None:
            values = values.reshape(-1)
            values = torch.empty_like(values).index_copy_(0, self.order, values)
        cols = self.cols if self.used is None or self.places is not None else self.used[self.cols.long()]
        values = values.reshape(cols.shape)
        if self.rows is None:
            gk.selected_addmm_(output, input, cols, values, row_offsets=self.row_offsets)
        else:
            few = output.index_select(1, self.rows)
            output.index_copy_(1, self.rows, gk.selected_addmm_(few, input, cols, values))


def _compacted(cols: Tensor, inputs: int, share: float) -> tuple[Tensor | None, Tensor]:
    """The used columns, or None if they are more than ``share`` of the inputs, and each column's position in them."""
    used = _used(cols, inputs, share)
    if used is None:
        return None, cols.to(torch.int32)
    return used.to(torch.int32), torch.searchsorted(used, cols.contiguous(), out_int32=True)


def _used(cols: Tensor, inputs: int, share: float) -> Tensor | None:
    """The used columns, ascending, or None if they are more than ``share`` of the inputs, or all."""
    used = cols.unique()
    return None if used.numel() == inputs or used.numel() > share * inputs else used


@dataclass(frozen=True, eq=False)
class Lookup(_Movable):
    """The selected entries of an embedding's gradient.

    Attributes:
        shape: shape of the result.
        vocabulary: number of rows of the embedding.
        rows: int64, ascending: the rows (tokens) with selected entries. None: all of them.
        cols: int64 [rows, k], the selected columns of every row, or [k], the same ones in each. None: whole rows.
        entries: int64 [2, nnz], position in ``rows`` and column of every entry, for rows with different numbers of
            entries. The full gradient of these rows is computed first.
    """

    shape: tuple[int, ...]
    vocabulary: int
    rows: Tensor | None = None
    cols: Tensor | None = None
    entries: Tensor | None = None

    def weight_grad(self, grad_output: Tensor, tokens: Tensor, padding_idx: int | None) -> Tensor:
        """The selected entries in mask order.

        Args:
            grad_output: [tokens, dim].
            tokens: int [tokens], the numbers that were looked up.
            padding_idx: a token without a gradient.
        """
        count = self.vocabulary if self.rows is None else self.rows.numel()
        slots = tokens.long()
        ignored = slots == (-1 if padding_idx is None else padding_idx)
        if self.rows is not None:
            tokens, slots = slots, torch.searchsorted(self.rows, slots).clamp_max_(count - 1)
            ignored |= self.rows[slots] != tokens
        picked = grad_output
        if self.cols is not None:
            picked = grad_output[:, self.cols] if self.cols.ndim == 1 else grad_output.gather(1, self.cols[slots])
        grad = torch.ops.aten.embedding_dense_backward(
            picked.to(trained_dtype(grad_output)), slots.masked_fill(ignored, count), count + 1, count, False
        )[:count]
        if self.entries is not None:
            grad = grad[self.entries[0], self.entries[1]]
        return grad.reshape(self.shape)


@dataclass(frozen=True, eq=False)
class Taps(_Movable):
    """The inputs that a convolution's selected entries read. A tap is one channel at one position of the kernel.

    Attributes:
        kernel: size of the kernel in each dimension.
        all_channels: number of input channels.
        channels: int64, ascending: the channels with a used tap.
        channel: int64 [taps], position of each tap's channel in ``channels``.
        places: int64 [dimensions, taps], position of each tap in the kernel.
    """

    kernel: tuple[int, ...]
    all_channels: int
    channels: Tensor
    channel: Tensor
    places: Tensor

    @staticmethod
    def of(product: Product, all_channels: int, kernel: Sequence[int], device: torch.device) -> Taps:
        """The taps of a product over the columns (channel, *place) of a convolution."""
        rest = torch.arange(product.inputs, device=device) if product.used is None else product.used.long()
        places = []
        for size in reversed(kernel):
            places.append(rest % size)
            rest = rest // size
        channels, channel = rest.unique(return_inverse=True)
        return Taps(tuple(kernel), all_channels, channels, channel, torch.stack(places[::-1]))

    @property
    def count(self) -> int:
        return self.channel.numel()

    def keep(self, input: Tensor, size: Sequence[int], geometry: Geometry) -> tuple[str, Tensor]:
        """What backward needs of ``input`` [batch, channels, *size], in its smallest form.

        Args:
            size: spatial size of the output.
            geometry: stride, padding and dilation.

        Returns:
            The name of the form (``"taps"`` [batch, taps, *size], ``"channels"`` or ``"input"``), and the tensor.
        """
        positions, outputs = input[0, 0].numel() if input.numel() else 0, math.prod(size)
        whole = self.all_channels * positions
        smallest = min(self.count * outputs, self.channels.numel() * positions)
        if smallest > COPIED_SHARE * whole:
            return "input", input
        if self.count * outputs <= smallest:
            return "taps", self._cut(input, self.channels[self.channel], size, geometry)
        return "channels", input.index_select(1, self.channels)

    def factor(self, kept: Tensor, kept_as: str, size: Sequence[int], geometry: Geometry) -> Tensor:
        """The factor [batch, tokens, taps] of the product, from what :meth:`keep` returned."""
        if kept_as == "channels":
            kept = self._cut(kept, self.channel, size, geometry)
        elif kept_as == "input":
            kept = self._cut(kept, self.channels[self.channel], size, geometry)
        return kept.flatten(2).mT

    def _cut(self, input: Tensor, channel: Tensor, size: Sequence[int], geometry: Geometry) -> Tensor:
        """[batch, taps, *size]: what each tap reads for every output."""
        stride, padding, dilation = geometry
        padded = F.pad(input, [side for pad in reversed(padding) for side in (pad, pad)]) if any(padding) else input
        batch, channels, *steps = padded.stride()
        windows = padded.as_strided(
            (*padded.shape[:2], *self.kernel, *size),
            (
                batch,
                channels,
                *(step * every for step, every in zip(steps, dilation, strict=True)),
                *(step * every for step, every in zip(steps, stride, strict=True)),
            ),
        )
        return windows[(slice(None), channel, *self.places)]
