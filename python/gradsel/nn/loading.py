"""load_state_dict() of an attached model: values win over weights, and a plain checkpoint becomes the new base."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradsel.attached import RECORD, SUFFIX, Attachments, Differences, Original, Selected, attachments_of, masks_in
from gradsel.attached.steps import some
from gradsel.dtypes import differs, trained_dtype
from gradsel.nn.buffers import begin_with
from gradsel.quantised import keeps_own_state
from gradsel.sharding import is_sharded
from gradsel_kernels._warnings import user_stacklevel

#: The key of a module's metadata in a state_dict with the fingerprints of its masks. safetensors files drop it.
METADATA = "gradsel_masks"

StateDict = dict[str, Any]


def after_state_dict(module: nn.Module, state_dict: StateDict, prefix: str, local_metadata: StateDict) -> None:
    """Puts the fingerprints of a module's masks beside its values."""
    attachments = attachments_of(module)
    if attachments is not None:
        local_metadata[METADATA] = masks_in(attachments)


def before_root_state_dict(root: nn.Module, prefix: str, keep_vars: bool) -> None:
    vars(root)[RECORD].keep_vars = keep_vars  # which hooks after it are not told


def after_root_state_dict(root: nn.Module, state_dict: StateDict, prefix: str, local_metadata: StateDict) -> None:
    """Adds the differences of layers that save their own tensors only."""
    for path, module in root.named_modules(remove_duplicate=False):
        attachments = attachments_of(module)
        if attachments is None:
            continue
        for short, differences in attachments.differences.items():
            values, start = differences.values(), prefix + (f"{path}." if path else "")
            if values is not None and keeps_own_state(module):
                state_dict[start + short + SUFFIX] = values if vars(root)[RECORD].keep_vars else values.detach()
                own_metadata = getattr(state_dict, "_metadata", {}).setdefault(start.removesuffix("."), {})
                own_metadata[METADATA] = masks_in(attachments)


def before_root_load(root: nn.Module, state_dict: StateDict, prefix: str, *rest: Any) -> None:
    """Decides what kind of checkpoint is loaded, before anything is.

    Raises:
        RuntimeError: its values belong to another selection.
    """
    record = vars(root)[RECORD]
    metadata = getattr(state_dict, "_metadata", None) or {}
    brought, continues, matches = False, True, False
    record.values_alone = set()
    for path, module in root.named_modules():
        attachments = attachments_of(module)
        own_metadata = metadata.get((prefix + path).removesuffix("."), {})
        brought |= METADATA in own_metadata
        for short, differences in {} if attachments is None else attachments.differences.items():
            start = prefix + (f"{path}." if path else "") + short
            brought |= start + SUFFIX in state_dict
            _require_own(differences, start, state_dict, own_metadata)
            if keeps_own_state(module):
                _load_differences(differences, start + SUFFIX, state_dict, *rest)
        for short, selected in {} if attachments is None else attachments.partial.items():
            start = prefix + (f"{path}." if path else "") + short
            if selected.shards is not None:
                has_values = _brings_shards(state_dict, start, selected, own_metadata.get(METADATA, {}).get(short))
                brought |= has_values
                if has_values and start not in state_dict:
                    record.values_alone.add(selected.name)
                continue
            values, weight = (_given(state_dict, key, selected) for key in (start + SUFFIX, start))
            known = own_metadata.get(METADATA, {}).get(short)
            if values is not None:
                brought = True
                if known is not None:
                    fits = known == selected.fingerprint()
                else:  # a file of safetensors: what the weight holds tells whose values these are
                    fits = weight is None or _agree(selected.mask.to(weight.device).gather(weight), values)
                if not fits:
                    raise RuntimeError(f"{start}{SUFFIX} holds the {_OTHER}")
                own = selected.weight()
                if weight is None and selected.replaced is not None and own is not None:
                    matches |= _agree(selected.mask.gather(own.detach()), values)
            elif weight is not None and (own := selected.values()) is not None:
                continues &= _agree(selected.mask.to(weight.device).gather(weight), own)
    record.rebased = []
    record.resuming = brought or (record.resuming and continues)
    record.loading = "attached" if record.resuming else "plain"
    if record.loading == "plain":
        begin_with(root, state_dict, prefix)
    if brought:  # shards with weights may have come first, and have been taken for a plain checkpoint
        for kept in _kept_in(root):
            if matches and kept.replaced is not None:
                kept.entries = kept.replaced
            kept.replaced = None


def _require_own(differences: Differences, key: str, state_dict: StateDict, metadata: Mapping[str, Any]) -> None:
    """Refuses differences of another selection."""
    short = key.rpartition(".")[2]
    known = metadata.get(METADATA, {}).get(short)
    if key + SUFFIX in state_dict and known not in (None, differences.fingerprint()):
        raise RuntimeError(
            f"{key}{SUFFIX} holds the differences of another selection than the one that the model is attached to; "
            "attach the model to the selection that the checkpoint was trained with"
        )


def _load_differences(
    differences: Differences,
    key: str,
    state_dict: StateDict,
    metadata: Any,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Loads those of a layer that loads its own tensors only, and reports what torch reports of others."""
    given, values = state_dict.get(key), differences.values()
    if not isinstance(given, Tensor) or values is None:
        if strict:
            missing.append(key)
    elif given.shape != values.shape:
        errors.append(
            f"size mismatch for {key}: copying a param with shape {given.shape} from checkpoint, the shape in current "
            f"model is {values.shape}."
        )
    else:
        with torch.no_grad():
            values.copy_(given)


_OTHER = (
    "values of another selection than the one that the model is attached to; attach the model to the selection that "
    "the checkpoint was trained with, or load the plain weights (gradsel.export) before attach()"
)


def _brings_shards(state_dict: Mapping[str, Any], name: str, selected: Selected, known: int | None) -> bool:
    """Whether a checkpoint has the values of a sharded weight; whose they are shows once they are loaded."""
    has_weight, has_values = (key in state_dict for key in (name, name + SUFFIX))
    if has_weight and not has_values:
        raise RuntimeError(
            f"the checkpoint has {name} and not {name}{SUFFIX}, so it is one of the plain model: load it before "
            "fully_shard() and attach()"
        )
    if has_values and known is not None and known != selected.fingerprint():
        raise RuntimeError(f"{name}{SUFFIX} holds the {_OTHER}")
    return has_values


def after_root_load(root: nn.Module, incompatible_keys: Any) -> None:
    record = vars(root)[RECORD]
    for name, selected in record.sharded.items():
        if selected.shards is not None and name in record.values_alone:
            selected.shards.write()
        elif selected.shards is not None and not selected.shards.agree():
            raise RuntimeError(f"the checkpoint has {name}{SUFFIX} with the {_OTHER}")
    rebased, record.rebased, record.loading = record.rebased, [], None
    _report_rebased(rebased)


def before_load(module: nn.Module, state_dict: StateDict, prefix: str, *rest: Any) -> None:
    """Completes a checkpoint of the plain model by values; its entries are the new originals."""
    attachments = attachments_of(module)
    if attachments is None:
        return
    brought = any(prefix + short + SUFFIX in state_dict for short in attachments.partial)
    if (attachments.record.loading or ("attached" if brought else "plain")) == "attached":
        return
    rebased = []
    for short, selected in attachments.partial.items():
        weight = _given(state_dict, prefix + short, selected)
        if weight is not None:
            entries = selected.mask.to(weight.device).gather(weight.detach())
            own = selected.values()
            if own is not None and _agree(entries, own):  # of a shard; the values of another one have more digits
                state_dict[prefix + short + SUFFIX] = own.detach().clone()
            else:
                state_dict[prefix + short + SUFFIX] = entries.to(trained_dtype(weight), copy=True)
            if _begin_with(selected, entries):
                rebased.append(selected.name)
    for short, original in attachments.whole.items():
        whole = state_dict.get(prefix + short)
        if (
            isinstance(whole, Tensor)
            and whole.shape == original.entries.shape
            and _begin_with(original, whole.detach())
        ):
            rebased.append(original.name)
    if attachments.record.loading is None:  # a part of the model is loaded
        _report_rebased(rebased)
    else:
        attachments.record.rebased += rebased


@torch.no_grad()
def after_load(module: nn.Module, incompatible_keys: Any) -> None:
    """Writes values that have been loaded to their weights, at which a compiled forward does not look again.

    Another shard of the checkpoint may bring the weights, so it is not noted that they agree now. Quantised weights
    stay frozen: quanto's layers put new parameters in their place.
    """
    attachments = attachments_of(module)
    for short in () if attachments is None else attachments.differences:
        if (quantised := module._parameters.get(short)) is not None and quantised.requires_grad:
            quantised.requires_grad_(False)
    with torch._C.DisableTorchFunctionSubclass():
        for selected in () if attachments is None else attachments.partial.values():
            weight, values = selected.weight(), selected.values()
            if selected.shards is not None or weight is None or values is None or weight.is_meta or values.is_meta:
                continue
            if selected.seen is None or selected.state_of(weight, values)[:3] != selected.seen[:3]:
                selected.mask.scatter_(weight, values)


def _report_rebased(names: list[str]) -> None:
    if names:
        warnings.warn(
            f"the checkpoint has no values (<name>{SUFFIX}) and no metadata of an attached model, so it counts as one "
            f"of the plain model: its entries of {len(names)} trained parameters ({some(names)}) are the new "
            "originals, to which gradsel.detach(restore=True) returns, anchors pull and deltas refer. If they were "
            "trained instead: load the original checkpoint, then write the trained entries to the parameters, "
            "parameter.copy_(trained), or load a delta. To resume, save model.state_dict() by torch.save(), which "
            "keeps its metadata",
            stacklevel=user_stacklevel(),
        )


def _begin_with(kept: Selected | Original, entries: Tensor) -> bool:
    """Whether these entries are new as originals."""
    before = kept.entries
    new = entries.to(before.device, before.dtype, copy=True)
    if _agree(new, before):
        return False
    kept.replaced, kept.entries = before, new
    return True


def _kept_in(root: nn.Module) -> Iterator[Selected | Original]:
    for module in root.modules():
        attachments: Attachments | None = attachments_of(module)
        if attachments is not None:
            yield from attachments.partial.values()
            yield from attachments.whole.values()


def _given(state_dict: Mapping[str, Any], key: str, selected: Selected) -> Tensor | None:
    """A tensor of a checkpoint, if it is there and fits; what does not fit torch refuses by itself."""
    tensor = state_dict.get(key)
    shape = selected.mask.compact_shape if key.endswith(SUFFIX) else selected.mask.shape
    if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape:
        return None
    return None if tensor.is_meta or is_sharded(tensor) else tensor


def _agree(entries: Tensor, values: Tensor) -> bool:
    """Whether entries of a weight are these values, rounded."""
    values = values.detach().to(entries.device, entries.dtype)
    return not bool(differs(entries.detach(), values).any())
