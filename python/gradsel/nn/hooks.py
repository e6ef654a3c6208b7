"""What modules of an attached model look after: that nothing replaces their parameters unnoticed, and loading."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parallel import DistributedDataParallel

from gradsel.attached import (
    LINK,
    OFFLOADED,
    STATE,
    SUFFIX,
    Attachments,
    Selected,
    SelectedValues,
    attachments_of,
    masks_in,
)
from gradsel.nn import functional
from gradsel.nn.converting import Conversion, adopt_values, adopt_weight
from gradsel.nn.lending import lend, take_back
from gradsel.nn.loading import (  # fmt: skip
    after_load,
    after_root_load,
    after_root_state_dict,
    after_state_dict,
    before_load,
    before_root_load,
    before_root_state_dict,
)
from gradsel.nn.saving import save_as_before, save_plainly
from gradsel.nn.sharding import (
    check_gathered,
    hand_out_split,
    refuse_different,
    take_place,
    unwatch_assignments,
    watch_assignments,
)
from gradsel.nn.weights import SelectedWeight
from gradsel.parameters.claimed import require_own_linear
from gradsel.parameters.trainable import why_untrainable
from gradsel.sharding import is_sharded

_LINEAR = nn.functional.linear


def hook(module: nn.Module, attachments: Attachments) -> None:
    """Registers the hooks of one module."""
    _watch_registration()
    if attachments.partial or attachments.differences:
        module.register_forward_pre_hook(before_forward)
    if attachments.partial:
        vars(module).setdefault("_apply", Conversion(attachments))
    if attachments.partial or attachments.differences:
        watch_assignments(module, attachments)
    if attachments.partial or attachments.whole or attachments.differences:
        module.register_state_dict_post_hook(after_state_dict)
        module.register_load_state_dict_pre_hook(before_load)
        module.register_load_state_dict_post_hook(after_load)


def hook_root(root: nn.Module) -> None:
    """Registers those of the module that attach() was called on."""
    root.register_state_dict_pre_hook(before_root_state_dict)
    root.register_state_dict_post_hook(after_root_state_dict)
    root.register_load_state_dict_pre_hook(before_root_load)
    root.register_load_state_dict_post_hook(after_root_load)
    save_plainly(root)


_HOOKS = (
    before_root_state_dict, after_root_state_dict, before_root_load, after_root_load, before_load, after_load,
    after_state_dict, take_back,
)  # fmt: skip


def unhook(module: nn.Module) -> None:
    """Takes all of them off again, also those of a copied module."""
    for hooks in (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._state_dict_pre_hooks,
        module._state_dict_hooks,
        module._load_state_dict_pre_hooks,
        module._load_state_dict_post_hooks,
    ):
        for key, found in list(hooks.items()):
            if getattr(found, "hook", found) in (before_forward, *_HOOKS):
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)
    if isinstance(vars(module).get("_apply"), Conversion):
        del module._apply
    save_as_before(module)
    unwatch_assignments(module)


def before_forward(module: nn.Module, args: Any) -> None:
    """Refuses, or mends, a module whose weight or values are no longer those that attach() set up."""
    attachments: Attachments | None = vars(module).get(STATE)
    if attachments is None:  # torch.ao.quantization copies hooks to the modules that it makes
        return
    if torch.compiler.is_compiling():  # torch.export has put fake tensors in their place
        hand_out_split(module, attachments)
        return
    if not attachments.record.ranks_agree:
        _compare_ranks(attachments)
    if nn.functional.linear is not _LINEAR:
        require_own_linear()
    own = module._parameters
    for short, selected in attachments.partial.items():
        if selected.shards is not None:
            check_gathered(module, short, selected)
            continue
        weight, values = own.get(short), own.get(short + SUFFIX)
        if (
            type(weight) is not SelectedWeight
            or type(values) is not SelectedValues
            or vars(weight)[LINK] is not selected
        ):
            _mend(module, short, selected, weight, values)
    if any(type(arg) is not Tensor and isinstance(arg, Tensor) for arg in args):
        _hand_out_plain(module, attachments)


def _hand_out_plain(module: nn.Module, attachments: Attachments) -> None:
    """For inputs with torch functions of their own (jagged tensors), which do not ask the weight for its own."""
    plain = {short: each for short, each in attachments.partial.items() if each.shards is None}
    with torch._C.DisableTorchFunctionSubclass():
        for short, selected in plain.items():
            weight = module._parameters.get(short)
            values = None if weight is None else selected.refresh(weight)
            if weight is not None and values is not None:
                lend(module, short, functional.harvest(weight.detach(), values, selected.mask))


def _mend(module: nn.Module, short: str, selected: Selected, weight: Tensor | None, values: Tensor | None) -> None:
    name, kind = selected.name, type(module).__name__
    if getattr(module, "_is_replica", False):
        _replicate(module, short, selected)
        return
    if weight is None and selected.weight() is None:
        raise RuntimeError(
            f"{name} has been taken out of its {kind}, or renamed in it, since attach(): {name}{SUFFIX} would no "
            "longer train anything. Call gradsel.detach(model) first, and attach anew afterwards"
        )
    for tensor, called in ((weight, name), (values, name + SUFFIX)):
        if tensor is None and called != name:
            raise RuntimeError(f"{called} has been taken out of its {kind}; call gradsel.detach(model) first")
        if tensor is not None and (reason := why_untrainable(tensor)) is not None:
            raise RuntimeError(
                f"{called} has become {reason}. Attached models cannot be sharded (FSDP, tensor parallelism) or "
                "quantised: use DistributedDataParallel, or call gradsel.detach(model) first"
            )
    if weight is not None and selected.is_swapped(weight):  # torch.__future__.set_swap_module_params_on_conversion
        adopt_weight(weight, selected)
    if weight is not None and vars(weight).get(LINK) is not selected:
        if weight.is_meta:
            raise RuntimeError(f"{name} {OFFLOADED}")
        raise RuntimeError(
            f"{name} has been replaced by another {type(weight).__name__} since attach(), past nn.Module's own ways "
            f"(FullyShardedDataParallel and functional_call do so), and no gradient would reach {name}{SUFFIX}. Pass "
            f"{name}{SUFFIX} to functional_call instead; shard a model by fully_shard(); to change the weight, write "
            "to it: weight.copy_(new); for anything else, call gradsel.detach(model) first"
        )
    assert values is not None
    if (
        type(values) is nn.Parameter and selected.seen is not None and selected.seen[0] == id(values)
    ):  # swapped likewise
        adopt_values(values, selected, weight)


def _replicate(module: nn.Module, short: str, selected: Selected) -> None:
    """nn.DataParallel: a replica holds plain copies as attributes, values with a history."""
    weight, values = (vars(module)[key] for key in (short, short + SUFFIX))
    mask = selected.mask.to(weight.device)
    with torch.no_grad():
        mask.scatter_(weight, values)
    vars(module)[short] = functional.harvest(weight, values, mask)


@cache
def _watch_registration() -> None:
    register_module_parameter_registration_hook(_registered)


def _registered(module: nn.Module, short: str, parameter: nn.Parameter | None) -> None:
    """A parameter is assigned to a module: of an attached one, it takes the place of a weight or of values."""
    attachments = attachments_of(module)
    if attachments is None or parameter is None:
        return
    try:
        _assign(module, attachments, short, parameter)
    except RuntimeError:
        if isinstance(module, nn.RNNBase) and short in module._flat_weights_names:  # which has it already
            module._flat_weights[module._flat_weights_names.index(short)] = module._parameters[short]
        raise


def _assign(module: nn.Module, attachments: Attachments, short: str, parameter: nn.Parameter) -> None:
    if take_place(module, attachments, short, parameter):
        return
    if is_sharded(parameter) and short in attachments.frozen():
        before = module._parameters.get(short)
        if before is not None and not before.requires_grad:
            parameter.requires_grad_(False)  # SequenceParallel makes parameters that require grad
    plain = short.removesuffix(SUFFIX)
    selected = attachments.partial.get(plain)
    original = attachments.whole.get(short) if selected is None else selected
    if original is None or (selected is not None and vars(parameter).get(LINK) is selected):
        return
    key = short.removeprefix(plain)
    others = [(other._parameters, there + key) for other, there in original.alive() if other is not module]
    others = [(own, there) for own, there in others if own.get(there) is not None and own[there] is not parameter]
    if others and attachments.record.loading is None:
        raise RuntimeError(
            f"{original.name} is attached and shared by {len(others) + 1} modules, so it cannot be replaced in one of "
            "them; write to it (weight.copy_(new)), or call gradsel.detach(model) first, and attach anew afterwards"
        )
    if selected is not None:
        _take_place(short, plain, selected, parameter)
    for own, there in others:  # load_state_dict(assign=True) keeps them tied
        own[there] = parameter


def _take_place(short: str, plain: str, selected: Selected, parameter: nn.Parameter) -> None:
    name = selected.name + (SUFFIX if short != plain else "")
    expected = selected.mask.shape if short == plain else selected.mask.compact_shape
    reason = why_untrainable(parameter)
    if LINK in vars(parameter):
        reason = f"{vars(parameter)[LINK].name}, which is trained on its own"
    if reason is not None or tuple(parameter.shape) != expected:
        found = reason or f"of shape {list(parameter.shape)}, not {list(expected)}"
        raise RuntimeError(
            f"{name} is attached and cannot be replaced by a parameter that is {found}; call gradsel.detach(model) "
            "first, and select and attach anew afterwards"
        )
    if short == plain:
        adopt_weight(parameter, selected)
        seen = selected.seen  # the weight has changed, values have not
        selected.seen = None if seen is None else [*seen[:3], -1, -1, -1]
    else:
        adopt_values(parameter, selected, selected.weight())


# --- Ranks -------------------------------------------------------------------------------------------------------


def _compare_ranks(attachments: Attachments) -> None:
    """At the first forward in DistributedDataParallel: all ranks must train the same entries."""
    if sharded := attachments.record.sharded:
        _require_sharded_weights(sharded)
        attachments.record.ranks_agree = True  # they were compared when values became DTensors
        return
    parallel = DistributedDataParallel._active_ddp_module
    if parallel is None or not dist.is_initialized():
        return
    group = parallel.process_group
    own: Mapping[str, int] = {
        f"{path}.{short}": mask
        for path, module in parallel.module.named_modules()
        if (there := attachments_of(module)) is not None
        for short, mask in masks_in(there).items()
    }
    everywhere: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everywhere, own, group=group)
    different = [name for name in own if any(other.get(name) != own[name] for other in everywhere)]
    different += [name for other in everywhere for name in other if name not in own]
    refuse_different(different)
    attachments.record.ranks_agree = True


def _require_sharded_weights(sharded: Mapping[str, Selected]) -> None:
    """Refuses values that FSDP shards without their weight, to which each rank would write a part of them only."""
    for name, selected in sharded.items():
        if not is_sharded(selected.shards.both[0]):  # type: ignore[union-attr]
            raise RuntimeError(
                f"FSDP shards {name}{SUFFIX}, and {name} is among its ignored_params: take it out of them, or freeze "
                "it in the selection"
            )
