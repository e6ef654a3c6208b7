"""Making a delta's parts from a model that is attached, was trained with a selection in another way, or has a base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from gradsel.attached import RECORD, attached_root
from gradsel.delta.file import require_dtype
from gradsel.delta.fitting import tensors_in
from gradsel.delta.parts import Part, bits_of, read, same_bits, tensors_of
from gradsel.delta.quantised import differences_of, part_of, places_in
from gradsel.delta.trained import trained_in
from gradsel.masks import Mask, Whole, same
from gradsel.masks.combining import recognised
from gradsel.nn.buffers import kept_buffers, saved_buffers
from gradsel.parameters.fingerprints import fingerprint, kind_of
from gradsel.parameters.names import named_parameters, shaped_parameters
from gradsel.quantised import StandIn
from gradsel.selection.selection import Selection, lookup
from gradsel.tables import shape_text

#: A model, or its state_dict.
Base = nn.Module | Mapping[str, Tensor]
Tensors = Mapping[str, Tensor]
#: The fraction of entries above which a tensor that was trained without a selection is set whole.
MOSTLY = 0.9


def parts_of(
    model: nn.Module, selection: Selection | None, base: Base | None, dtype: torch.dtype | None
) -> dict[str, Part]:
    """The parts of ``Delta.of``; see there."""
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point dtype to round to, got {dtype}")
    root = attached_root(model)
    before = None if base is None else tensors_in(root or model, tensors_of(base))
    if isinstance(base, nn.Module) and attached_root(base) is not None:
        raise ValueError("the base is attached, so its weights may have been trained; pass a plain one")
    if root is not None:
        if before is not None:
            if sharded := vars(root)[RECORD].sharded:
                raise ValueError(
                    f"{next(iter(sharded))} is sharded, so it cannot be compared with a base: leave out base, the "
                    "attached model knows its original entries"
                )
            _require_base_of(root, before)
        parts = _of_attached(root, selection, dtype)
    elif selection is not None:
        parts = _of_selection(model, selection, before, dtype)
    elif before is not None:
        parts = _of_base(named_parameters(model), before, dtype)
    else:
        raise ValueError("the model is not attached: pass the selection that it was trained with, or its base, or both")
    if before is not None:
        parts |= _of_base(saved_buffers(root or model), before, None)
    elif root is not None:
        parts |= _of_buffers(root)
    for name, part in parts.items():
        require_dtype(name, part.dtype)
        require_dtype(name, part.values.dtype)
    return parts


def differing(name: str, original: Tensor, tuned: Tensor, dtype: torch.dtype | None = None) -> Part | None:
    """The entries of two tensors of one name whose bits differ, all if most do, or None if there are none.

    Args:
        dtype: round floating-point values to this dtype.

    Raises:
        ValueError: shapes or dtypes differ, or a delta cannot hold the dtype.
    """
    for what, ours, theirs in (
        ("shape", shape_text(tuned.shape), shape_text(original.shape)),
        ("dtype", tuned.dtype, original.dtype),
    ):
        if ours != theirs:
            raise ValueError(f"{name} has {what} {ours}, {theirs} in the base; a delta replaces entries, not tensors")
    moved = (bits_of(tuned) != bits_of(original)).reshape(-1)
    count = int(moved.sum())
    if not count:
        return None
    require_dtype(name, original.dtype)
    if count > MOSTLY * moved.numel():  # a head: all of it is hardly larger, and fits on every other one
        return _beside(Whole(tuned.shape), tuned, original, dtype)
    return _beside(recognised(moved.nonzero().view(-1), tuned.shape), tuned, original, dtype)


def whole(name: str, tuned: Tensor, dtype: torch.dtype | None = None) -> Part:
    """All entries of a tensor that the base does not have, or in another size: a head.

    Args:
        dtype: round floating-point values to this dtype.

    Raises:
        ValueError: a delta cannot hold the dtype.
    """
    require_dtype(name, tuned.dtype)
    return Part(Whole(tuned.shape), _copied(tuned, dtype), tuned.dtype)


def _of_attached(root: nn.Module, selection: Selection | None, dtype: torch.dtype | None) -> dict[str, Part]:
    parts = {}
    for name, trained in trained_in(root).items():
        if selection is not None and not same(lookup(selection, name), trained.mask):
            raise ValueError(f"{name} is not attached as this selection says; pass the one that attach() got")
        part = Part(_on_cpu(trained.mask), _copied(trained.values, dtype), trained.tensor.dtype)
        known = "" if selection is None or trained.mask.is_whole else selection.base.get(name, "")
        parts[name] = replace(
            part,
            originals=_copied(trained.originals, None),
            digest=trained.digest_before(part),
            fingerprint=known if known.startswith(f"{kind_of(trained.tensor)} ") else trained.fingerprint_before(),
        )
    for name, differences in differences_of(root).items():
        if selection is not None and not same(lookup(selection, name), differences.mask):
            raise ValueError(f"{name} is not attached as this selection says; pass the one that attach() got")
        parts[name] = part_of(differences, dtype)
    return parts


def _of_buffers(root: nn.Module) -> dict[str, Part]:
    """The buffers of an attached model that have changed since attach()."""
    now = saved_buffers(root)
    kept = {name: tensor.to(now[name].device, now[name].dtype) for name, tensor in kept_buffers(root).items()}
    return _of_base({name: now[name] for name in kept}, kept, None)


def _require_base_of(root: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Checks that an attached model comes from this base and that its frozen entries are unchanged."""
    trained = trained_in(root)
    hidden = {own.values.data_ptr() for own in trained.values() if own.values is not own.tensor}
    for name, parameter in named_parameters(root).items():
        if parameter.data_ptr() in hidden or name not in before:
            continue
        ours = trained[name].whole_before() if name in trained else parameter.detach()
        theirs = before[name].detach().to(ours.device)
        if not same_bits(ours, theirs):
            raise ValueError(
                f"{name} was not this at attach(), or was changed outside the selection since; pass the base that the "
                "model was attached with"
            )


def _of_selection(
    model: nn.Module, selection: Selection, before: Tensors | None, dtype: torch.dtype | None
) -> dict[str, Part]:
    parts = {}
    if quantised := [name for name in places_in(model) if lookup(selection, name).nnz]:
        raise ValueError(
            f"{quantised[0]} is quantised, so only an attached model can have trained it: pass the model before it is "
            "detached"
        )
    for name, parameter in shaped_parameters(model).items():
        if isinstance(parameter, StandIn):
            continue
        mask = lookup(selection, name)
        if before is not None:
            original = _original(name, parameter, before)
            _require_untouched(name, mask, parameter, original)
            if mask.nnz:
                parts[name] = _beside(mask, parameter, original, dtype)
        elif mask.nnz:
            part = Part(_on_cpu(mask), _copied(mask.gather(parameter.detach()), dtype), parameter.dtype)
            known = selection.base.get(name, "")
            parts[name] = replace(part, fingerprint=known if known.startswith(f"{kind_of(parameter)} ") else "")
    return parts


def _of_base(tensors: Tensors, before: Tensors, dtype: torch.dtype | None) -> dict[str, Part]:
    found = {name: differing(name, _original(name, tensor, before), tensor, dtype) for name, tensor in tensors.items()}
    return {name: part for name, part in found.items() if part is not None}


def _beside(mask: Mask, tuned: Tensor, original: Tensor, dtype: torch.dtype | None) -> Part:
    part = Part(_on_cpu(mask), _copied(mask.gather(tuned.detach()), dtype), original.dtype)
    entries, digest = read(original, part)
    originals = entries.cpu().view(mask.compact_shape)
    return replace(part, originals=originals, digest=digest, fingerprint=fingerprint(original))


def _original(name: str, tensor: Tensor, before: Tensors) -> Tensor:
    if name not in before or before[name].shape != tensor.shape:
        found = shape_text(before[name].shape) if name in before else "missing"
        raise ValueError(
            f"{name} is {shape_text(tensor.shape)} in the model, {found} in the base; pass the model that training "
            "began with, new heads included"
        )
    return before[name].detach().to(tensor.device)


def _require_untouched(name: str, mask: Mask, tuned: Tensor, original: Tensor) -> None:
    if mask.nnz == mask.numel or same_bits(tuned, original):
        return
    moved = (bits_of(tuned) != bits_of(original)).reshape(-1)
    moved[mask.entries().to(moved.device)] = False
    if count := int(moved.sum()):
        raise ValueError(f"{count:,} entries of {name} differ from the base and are not selected; the delta lacks them")


def _copied(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A copy on the CPU, rounded to ``dtype`` if it is floating-point."""
    target = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", target, copy=True).contiguous()


def _on_cpu(mask: Mask) -> Mask:
    return mask.to(torch.device("cpu"))
