"""Patches: what a server of the base needs to have the weights that training has now.

A patch has the fields that ``CheckpointWeightPatch`` of vLLM has (in its model_loader/checkpoint_weight_patch.py), in
the same order: name, shape and dtype of a tensor in the checkpoint, absolute values, and flat indices. Whoever trains
selected entries knows which entries these are, so no dense weights are compared.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from gradsel.attached import attached_root, attachments_of, is_values
from gradsel.integrations.patch_bytes import checksum, packed, unpacked
from gradsel.masks import Mask, Whole, same
from gradsel.parameters import checkpoint_names
from gradsel.parameters.checkpoint_names import Shape
from gradsel.parameters.names import strip_wrappers, unwrapped

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Patch(NamedTuple):
    """New values of some or all entries of one tensor of a checkpoint.

    Attributes:
        name: of the tensor in the checkpoint.
        shape: of the whole tensor.
        dtype: in which it is served.
        values: [n], absolute, in ``dtype``.
        indices: int32 or int64 [n], ascending row-major indices in the tensor; None: ``values`` are all of it.
    """

    name: str
    shape: Shape
    dtype: torch.dtype
    values: Tensor
    indices: Tensor | None = None


class _Part(Protocol):
    """A part of a :class:`gradsel.Delta`, which is on a higher floor."""

    mask: Mask
    values: Tensor
    dtype: torch.dtype


@dataclass(frozen=True)
class Patches:
    """One update of a server, and its place in the sequence of updates.

    Attributes:
        sparse: patches of some entries of a tensor.
        whole: patches of all entries of a tensor.
        run: a random number that all updates of one sequence share.
        sequence: counts from 0; an update whose predecessor was lost must not be applied.
        before: the checksum of all updates before this one; "" for a full update, which needs none of them.
        after: the checksum of all updates up to this one.
    """

    sparse: list[Patch]
    whole: list[Patch]
    run: str
    sequence: int
    before: str
    after: str
    _sent: Mapping[str, _Sent] = field(default_factory=dict, repr=False, compare=False)

    @property
    def is_full(self) -> bool:
        """Whether it has all that is trained, whatever the server has of it."""
        return not self.before

    @property
    def nbytes(self) -> int:
        """Bytes of all values and indices."""
        return sum(p.values.nbytes + (0 if p.indices is None else p.indices.nbytes) for p in self)

    def __iter__(self) -> Iterator[Patch]:
        yield from self.sparse
        yield from self.whole

    def __bool__(self) -> bool:
        """Whether anything changes."""
        return bool(self.sparse or self.whole)

    def to_bytes(self) -> bytes:
        """The update in one piece of the safetensors format, with its place in the sequence."""
        header = {"run": self.run, "sequence": self.sequence, "before": self.before, "after": self.after}
        return packed(list(self), header)

    @staticmethod
    def from_bytes(data: bytes) -> Patches:
        """The inverse of :meth:`to_bytes`.

        Args:
            data: untrusted.

        Raises:
            ValueError: they are not an update, or are damaged.
        """
        found, header = unpacked(data)
        patches = [Patch(*each) for each in found]
        run, sequence, before, after = (header.get(key) for key in ("run", "sequence", "before", "after"))
        if not (isinstance(run, str) and isinstance(before, str) and isinstance(sequence, int)):
            raise ValueError("an update without run, sequence and checksum")
        is_empty = bool(before) and not patches
        if after != (before if is_empty else checksum(patches, run, sequence, before)):
            raise ValueError(f"update {sequence} is damaged: its checksum is not {after}")
        sparse = [patch for patch in patches if patch.indices is not None]
        return Patches(sparse, [patch for patch in patches if patch.indices is None], run, sequence, before, str(after))


def patches(
    model_or_delta: nn.Module | Mapping[str, _Part],
    since: Patches | None = None,
    *,
    dtype: torch.dtype | None = None,
    full: bool = False,
) -> Patches:
    """What a server must write to its weights to have those that are trained now.

    Args:
        model_or_delta: an attached model, wrapped or not; or a :class:`gradsel.Delta`, whose names are used as they
            are.
        since: the last result for this model: only entries whose stored bits have changed since then are included.
            None: the first update, with all entries that are trained.
        dtype: in which the server has floating-point tensors; None: as they are in the model. Entries that are equal
            when rounded to it have not changed.
        full: include all entries, to follow an update that was lost.

    Returns:
        The update, with names, shapes and layout of the model's checkpoints, as ``save_pretrained`` would write them.
        If nothing has changed, it is empty and has the sequence number of the last one; it need not be sent.

    Raises:
        ValueError: the model is not attached, or is sharded; other entries are trained than before; or a value is NaN,
            which stands for "unchanged" in servers.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point dtype to serve in, got {dtype}")
    first = _first
    if isinstance(model_or_delta, nn.Module):
        current = dict(_of_model(model_or_delta))
        first = first if since is not None else _Places(model_or_delta).first
    else:
        if quantised := [name for name, part in model_or_delta.items() if getattr(part, "differences", "")]:
            _refuse_differences(quantised)
        current = {name: _Entries(p.mask, p.values.to(p.dtype).reshape(-1)) for name, p in model_or_delta.items()}
    if since is not None and current.keys() != since._sent.keys():
        changed = sorted(current.keys() ^ since._sent.keys())
        raise ValueError(
            f"other tensors are trained than in the last update, first {changed[0]}: the server would keep what they "
            "were; let it load the base, and begin a new sequence with since=None"
        )
    sent: dict[str, _Sent] = {}
    found: dict[str, list[Patch]] = {}
    for name, entries in current.items():
        own = entries.rounded(dtype)
        before = None if since is None else since._sent[name]
        sent[name] = first(name, own) if before is None else before.follow(name, own)
        for patch in sent[name].patches(name, None if full else before):
            found.setdefault(patch.name, []).append(patch)
    joined = [_joined(each) for each in found.values()]
    if since is not None and not joined and not full:
        return replace(since, sparse=[], whole=[], before=since.after, _sent=sent)
    run = secrets.token_hex(8) if since is None else since.run
    sequence = 0 if since is None else since.sequence + 1
    chain = "" if since is None or full else since.after
    return Patches(
        [patch for patch in joined if patch.indices is not None],
        [patch for patch in joined if patch.indices is None],
        run,
        sequence,
        chain,
        checksum(joined, run, sequence, chain),
        sent,
    )


@dataclass(frozen=True)
class _Entries:
    """What is trained in one tensor: which entries, and their values, flat in mask order."""

    mask: Mask
    values: Tensor

    def rounded(self, dtype: torch.dtype | None) -> _Entries:
        if dtype is None or not self.values.is_floating_point():
            return self
        return _Entries(self.mask, self.values.to(dtype))


@dataclass(frozen=True)
class _Sent:
    """What the server has of one tensor of the model.

    Attributes:
        mask: its entries.
        values: flat, in mask order, as they are served.
        tensors: shapes of the checkpoint's tensors that it is in.
        numbers: for each value, its number among the entries of ``tensors``, one after the other, row-major; None:
            it is all of one tensor.
    """

    mask: Mask
    values: Tensor
    tensors: Mapping[str, Shape]
    numbers: Tensor | None

    def follow(self, name: str, entries: _Entries) -> _Sent:
        """The same for other values.

        Raises:
            ValueError: the entries or their dtype are others.
        """
        if entries.mask is not self.mask and not same(entries.mask, self.mask):
            raise ValueError(
                f"other entries of {name} are trained than in the last update: the server would keep what they were; "
                "let it load the base, and begin a new sequence with since=None"
            )
        if entries.values.dtype is not self.values.dtype:
            raise ValueError(
                f"{name} was served in {self.values.dtype} and would be served in {entries.values.dtype} now; keep "
                "dtype= as it was"
            )
        numbers = None if self.numbers is None else self.numbers.to(entries.values.device)
        return _Sent(self.mask, entries.values, self.tensors, numbers)

    def patches(self, name: str, before: _Sent | None) -> Iterator[Patch]:
        """The patches of the checkpoint's tensors, of all entries or of those that differ from ``before``."""
        values, numbers = self.values, self.numbers
        if before is not None:
            bits = _BITS[values.element_size()]
            differs = values.view(bits) != before.values.to(values.device).view(bits)
            if not bool(differs.any()):
                return
            if numbers is not None:
                values, numbers = values[differs], numbers[differs]
        if values.is_floating_point() and bool(values.isnan().any()):
            raise ValueError(f"{name} has values that are NaN; servers take NaN for an entry that stays as it is")
        if numbers is None or len(self.tensors) == 1:
            for there, shape in self.tensors.items():
                yield Patch(there, shape, values.dtype, values, numbers)
            return
        sizes = torch.tensor([math.prod(shape) for shape in self.tensors.values()], device=values.device)
        ends = sizes.cumsum(0)
        owner = torch.searchsorted(ends, numbers, right=True)
        for place, (there, shape) in enumerate(self.tensors.items()):
            own = owner == place
            if bool(own.any()):
                yield Patch(there, shape, values.dtype, values[own], numbers[own] - (ends[place] - sizes[place]))


def _joined(parts: list[Patch]) -> Patch:
    """One patch of a tensor of the checkpoint from those of the model's tensors in it, its indices ascending."""
    first = parts[0]
    if first.indices is None:
        return first
    indices, values = first.indices, first.values
    if len(parts) > 1:
        indices = torch.cat([part.indices for part in parts if part.indices is not None])
        values = torch.cat([part.values for part in parts])
    if bool((indices.diff() < 0).any()):
        indices, order = indices.sort()
        values = values[order]
    kind = torch.int32 if math.prod(first.shape) < 2**31 else torch.int64
    return Patch(first.name, first.shape, first.dtype, values, indices.to(kind))


def _of_model(model: nn.Module) -> Iterator[tuple[str, _Entries]]:
    """What an attached model trains and its persistent buffers, by the names in it."""
    root = attached_root(model)
    if root is None:
        raise ValueError("the model is not attached: pass the one that gradsel.attach() was called on, or a Delta")
    plain = unwrapped(model)
    prefix = next(f"{strip_wrappers(path)}." if path else "" for path, m in plain.named_modules() if m is root)
    seen: set[str] = set()
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        for module in root.modules():
            attachments = attachments_of(module)
            if attachments is None:
                continue
            if attachments.differences:
                _refuse_differences([each.name for each in attachments.differences.values()])
            for selected in attachments.partial.values():
                weight = selected.weight()
                if weight is None or selected.name in seen:
                    continue
                _require_local(selected.name, weight)
                selected.refresh(weight)
                seen.add(selected.name)
                yield prefix + selected.name, _Entries(selected.mask, selected.mask.gather(weight).reshape(-1))
            for short, original in attachments.whole.items():
                whole = module._parameters[short]
                if whole is None or original.name in seen:
                    continue
                _require_local(original.name, whole)
                seen.add(original.name)
                yield prefix + original.name, _whole(whole)
    parameters = {id(parameter) for parameter in plain.parameters()}
    for key, tensor in plain.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in parameters and not is_values(tensor):
            yield strip_wrappers(key), _whole(tensor)


def _refuse_differences(names: list[str]) -> None:
    raise ValueError(
        f"{names[0]} is trained as differences from a quantised weight, and patches set entries of a dense one; serve "
        "Delta.of(model).to_lora(folder) on the quantised base, or gradsel.merge(model, dtype) first"
    )


def _whole(tensor: Tensor) -> _Entries:
    copied = tensor.detach().clone(memory_format=torch.contiguous_format)
    return _Entries(Whole(tuple(tensor.shape)), copied.view(-1))


def _require_local(name: str, tensor: Tensor) -> None:
    if hasattr(tensor, "full_tensor"):
        raise ValueError(f"{name} is a DTensor, of which this process has a shard; patches() needs whole tensors")


class _Places:
    """Where the entries of a model's tensors are in its checkpoints."""

    def __init__(self, model: nn.Module) -> None:
        self._names = checkpoint_names.of_model(model, {})

    def first(self, name: str, entries: _Entries) -> _Sent:
        """What the server gets of a tensor that it has as it is in the base."""
        group = None if self._names is None else self._names.group(name, "checkpoint")
        if group is None or group.is_renaming:
            there = name if group is None else next(iter(group.checkpoint))
            return _first(there, entries)
        assert self._names is not None
        start = 0
        for each, shape in group.model.items():
            if each == self._names.own_name(name, "checkpoint"):
                break
            start += math.prod(shape)
        numbers = group.origins()[start + entries.mask.ordered_entries().cpu()].long()
        return _Sent(entries.mask, entries.values, group.checkpoint, numbers.to(entries.values.device))


def _first(name: str, entries: _Entries) -> _Sent:
    """What the server gets of a tensor that has the same name and layout there."""
    numbers = None if entries.mask.is_whole else entries.mask.ordered_entries().to(entries.values.device)
    return _Sent(entries.mask, entries.values, {name: tuple(entries.mask.shape)}, numbers)
