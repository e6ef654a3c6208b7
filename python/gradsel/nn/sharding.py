"""Attached models under FSDP2 (``torch.distributed.fsdp.fully_shard``) and tensor parallelism (``parallelize_module``).

FSDP replaces every parameter by a DTensor, its shard, and for a forward and its backward by a gathered one. It assigns
them past ``nn.Module.__setattr__`` unless a module has one of its own. So modules of an attached model have one until
they have seen both. Shards know their :class:`~gradsel.attached.Selected`, so that optimizers find the weight; gathered
parameters are a :class:`~gradsel.nn.weights.SelectedWeight` and values as in a model that is not sharded.

Tensor parallelism replaces parameters once, and its modules compute with DTensors. What FSDP gathers of these are
DTensors on fewer dimensions of a mesh (:mod:`gradsel.nn.tensor_parallel`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradsel.attached import (
    LINK,
    SUFFIX,
    Attachments,
    Differences,
    Original,
    Record,
    Selected,
    SelectedValues,
    selected_in,
)
from gradsel.dtypes import trained_dtype
from gradsel.masks import Mask, fingerprint
from gradsel.nn.lending import expect_no_loans
from gradsel.nn.tensor_parallel import expect, hand_out
from gradsel.nn.weights import SelectedWeight
from gradsel.sharding import (
    Shards,
    agree_over,
    by_rows,
    entries_of,
    is_managed,
    is_sharded,
    local_of,
    mesh_of,
    part_like,
    sharded_like,
    whole_of,
)


class Assigning:
    """``__setattr__`` of a module of an attached model, as an attribute of the module: nn.Module's own."""

    def __init__(self, attachments: Attachments) -> None:
        self.attachments = attachments

    def __call__(self, name: str, value: Any) -> None:
        module = self.attachments.module()
        assert module is not None
        type(module).__setattr__(module, name, value)


def watch_assignments(module: nn.Module, attachments: Attachments) -> None:
    """Makes FSDP assign parameters as everybody else does, so that registration hooks see them."""
    vars(module)["__setattr__"] = Assigning(attachments)


def unwatch_assignments(module: nn.Module) -> None:
    if isinstance(vars(module).get("__setattr__"), Assigning):
        del vars(module)["__setattr__"]


def take_place(module: nn.Module, attachments: Attachments, short: str, parameter: nn.Parameter) -> bool:
    """Handles a parameter that FSDP assigns; False if it is assigned by somebody else."""
    plain = short.removesuffix(SUFFIX)
    selected = attachments.partial.get(plain)
    if selected is None and short != plain and plain in attachments.differences:
        if is_sharded(parameter):
            _compare(attachments.differences[plain], parameter, attachments.record)
            unwatch_assignments(module)
        return is_sharded(parameter)
    if selected is None:
        original = attachments.whole.get(short)
        return original is not None and _is_shard_or_gathered(module, short, original, parameter)
    if is_sharded(parameter) and not _is_split_and_gathered(module, selected, plain == short, parameter):
        _take_shard(module, selected, plain == short, parameter, attachments.record)
        return True
    if selected.shards is None or tuple(parameter.shape) != _shape(selected, plain == short):
        return False
    _take_gathered(module, selected, plain == short, parameter)
    if all(each.shards is not None and len(each.shards.gathered) == 2 for each in attachments.partial.values()):
        unwatch_assignments(module)  # FSDP makes each of them once
    return True


def _is_shard_or_gathered(module: nn.Module, short: str, original: Original, parameter: Tensor) -> bool:
    before = module._parameters.get(short)
    sharded = is_sharded(parameter) or (before is not None and is_sharded(before))
    return sharded and parameter.shape == original.entries.shape


def _shape(selected: Selected, is_weight: bool) -> tuple[int, ...]:
    return selected.mask.shape if is_weight else selected.mask.compact_shape


def sharded_values(mask: Mask, weight: Tensor) -> tuple[nn.Parameter, Tensor]:
    """Values of a weight that is sharded already, and the entries that they begin with. A collective call.

    Both are sharded likewise where that is possible; otherwise every rank has all of them.
    """
    from torch.distributed.tensor import DTensor, Replicate

    entries, dtype, mesh = entries_of(mask, weight.detach()), trained_dtype(weight), mesh_of(weight)
    if by_rows(mask, weight):
        entries = sharded_like(entries, weight)
        return nn.Parameter(entries.to(dtype, copy=True)), entries
    everywhere = [Replicate()] * mesh.ndim
    return nn.Parameter(DTensor.from_local(entries.to(dtype, copy=True), mesh, everywhere, run_check=False)), entries


def link_shards(selected: Selected, weight: Tensor, values: Tensor, record: Record, managed: bool) -> None:
    """Makes shards known that are in their modules already.

    Args:
        managed: FSDP gathers the weight, and does not know the values.
    """
    vars(values)[LINK] = selected
    selected.shards = Shards(selected.mask)
    selected.shards.put(weight, values)
    if managed:
        selected.shards.gathered["values"] = None
    else:
        for module, _ in selected.alive():
            expect(module, selected, weight)
    record.sharded[selected.name] = selected


def require_alike(masks: Mapping[str, Mask], parameters: Mapping[str, Tensor]) -> None:
    """Refuses to attach ranks of a sharded model to different selections. A collective call for such a model.

    Raises:
        RuntimeError: on all ranks.
    """
    if sharded := {name: parameter for name, parameter in parameters.items() if is_sharded(parameter)}:
        partial = {name: masks[name] for name in sharded if masks[name].nnz and not masks[name].is_whole}
        mesh = max(map(mesh_of, sharded.values()), key=lambda each: each.ndim)
        refuse_different(agree_over(mesh, {name: fingerprint(mask) for name, mask in partial.items()}))


def _compare(masked: Selected | Differences, values: Tensor, record: Record) -> None:
    """Here and not in a forward: FSDP's first gather of values of different sizes would wait forever."""
    own = {masked.name: (masked.fingerprint(), len(record.trained))}
    refuse_different(agree_over(mesh_of(values), own))


def refuse_different(names: Sequence[str]) -> None:
    """
    Args:
        names: of the parameters whose masks are not the same on all ranks.

    Raises:
        RuntimeError: there are some.
    """
    if names:
        raise RuntimeError(
            f"ranks are attached to different selections ({len(names)} parameters differ, first {names[0]}), so they "
            "would train different models. Pass process_group=torch.distributed.group.WORLD to gradsel.select(), or "
            "save the selection on one rank and load it on all"
        )


def require_own_shards(root: nn.Module) -> None:
    """Refuses to detach a model whose values FSDP shards and gathers, which torch has no way to take from it.

    Raises:
        ValueError: it names the first weight.
    """
    for module in root.modules():
        for selected in selected_in(module).values() if is_managed(module) else ():
            if (shards := selected.shards) is not None and shards.are_known_to_fsdp:
                raise ValueError(
                    f"{selected.name} is sharded, and FSDP keeps its values, since attach() came first: "
                    "detach() cannot take them off. On all ranks, gradsel.export(model, path) writes the plain model, "
                    "gradsel.Delta.of(model) has what was trained"
                )


@torch.no_grad()
def restore_whole(parameter: Tensor, entries: Tensor) -> None:
    """Gives a parameter that was trained whole its entries back. It may have been split since they were kept."""
    if is_sharded(parameter) and not is_sharded(entries):
        local_of(parameter).copy_(part_like(entries, parameter))
    else:
        parameter.copy_(entries)


def detach_shards(selected: Selected, weight: Tensor, restore: bool) -> None:
    """Makes a weight that FSDP or tensor parallelism has split an ordinary one again.

    Args:
        restore: give it back its original entries.
    """
    shards = selected.shards
    assert shards is not None
    if restore:
        with torch.no_grad():
            shards.share.mask.scatter_(local_of(weight), shards.share.of(whole_of(selected.entries)))
    gathered = shards.gathered.get("weight")
    for tensor in (*shards.both, gathered):
        if tensor is not None:
            vars(tensor).pop(LINK, None)
    if type(gathered) is SelectedWeight:
        gathered.__class__ = nn.Parameter  # type: ignore[assignment]


def _is_split_and_gathered(module: nn.Module, selected: Selected, is_weight: bool, parameter: Tensor) -> bool:
    """Whether it is what FSDP gathers for a forward of a parameter that tensor parallelism has split."""
    shards = selected.shards
    if shards is None or not is_managed(module):
        return False
    known = shards.weight if is_weight else shards.values
    return known is not None and is_sharded(known) and mesh_of(parameter).ndim < mesh_of(known).ndim


def _take_shard(module: nn.Module, selected: Selected, is_weight: bool, parameter: Tensor, record: Record) -> None:
    shards = selected.shards
    if shards is None:
        shards = selected.shards = Shards(selected.mask)
        selected.entries = selected.entries.cpu()  # of all rows, and no forward needs them
        shards.put(selected.weight(), selected.values())
        record.sharded[selected.name] = selected
    known = shards.weight if is_weight else shards.values
    if known is parameter or (is_managed(module) and known is not None and _is_resharded(known, parameter)):
        return
    if not is_weight:
        _compare(selected, parameter, record)
    vars(parameter)[LINK] = selected
    if is_weight:
        parameter.requires_grad_(False)
    agreed = known is not None and (not is_sharded(known) or shards.agreed)
    shards.put(**{"weight" if is_weight else "values": parameter})
    if is_weight and not is_managed(module) and not parameter.is_meta:
        expect(module, selected, parameter)
    if agreed and shards.weight is not None and is_sharded(shards.weight):
        shards.mark()  # they agreed when FSDP, or tensor parallelism, read them


def _is_resharded(known: Tensor, parameter: Tensor) -> bool:
    """Whether it is what FSDP keeps between forward and backward with ``reshard_after_forward=<number of ranks>``."""
    return is_sharded(known) and known.device_mesh != parameter.device_mesh  # type: ignore[attr-defined]


def _take_gathered(module: nn.Module, selected: Selected, is_weight: bool, parameter: nn.Parameter) -> None:
    shards = selected.shards
    assert shards is not None
    if is_sharded(parameter):
        parameter.requires_grad_(not is_weight)
    elif is_weight:
        parameter.requires_grad_(False)
        parameter.__class__ = SelectedWeight
        with torch._C.DisableTorchFunctionSubclass():
            selected.follow(parameter)
    else:
        parameter.__class__ = SelectedValues
    vars(parameter)[LINK] = selected
    shards.gathered["weight" if is_weight else "values"] = parameter
    if is_weight and is_sharded(parameter):
        expect(module, selected, parameter)
    elif is_weight:
        expect_no_loans(module)  # it is not split in forward, as was expected when it became a DTensor
        shards.reduction()  # which torch.compile does not trace


def check_gathered(module: nn.Module, short: str, selected: Selected) -> None:
    """Before a forward: refuses a weight that is still sharded, and brings it up to date with what has been written.

    Raises:
        RuntimeError: FSDP has not gathered it.
    """
    shards, weight = selected.shards, module._parameters.get(short)
    assert shards is not None
    if weight is None or vars(weight).get(LINK) is not selected or (weight is shards.weight and is_managed(module)):
        raise RuntimeError(
            f"{selected.name} is a DTensor that FSDP has not gathered, so its {type(module).__name__} runs outside the "
            "forward of its FSDP module: call that one, or fully_shard() the module that is called"
        )
    if weight is not shards.weight and weight is not shards.gathered.get("weight"):
        raise RuntimeError(
            f"{selected.name} is shared by several modules, and parallelize_module has given each of them a weight of "
            "its own, as it does: tie them again, then select and attach"
        )
    changed = shards.refresh()
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        if changed and weight is not shards.weight:
            share = shards.part_of(weight).share if is_sharded(weight) else None
            values = shards.everywhere()
            if share is None:
                selected.mask.scatter_(weight, values)
            else:
                share.mask.scatter_(local_of(weight), share.of(values))
    if is_sharded(weight):
        hand_out(module, short, selected, weight)


def hand_out_split(module: nn.Module, attachments: Attachments) -> None:
    """In a forward that torch.compile traces: hands out the weights that tensor parallelism has split.

    They agree with their values; see :func:`gradsel.attach`.
    """
    if not attachments.record.sharded:
        return
    for short, selected in attachments.partial.items():
        weight = module._parameters.get(short)
        if selected.shards is not None and weight is not None and is_sharded(weight):
            hand_out(module, short, selected, weight)
