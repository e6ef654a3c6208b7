"""What attach() did to a model: the record that its modules carry, and that every other room asks."""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from gradsel.attached.differences import Differences
from gradsel.attached.selected import LINK, SUFFIX, Masked, Original, Selected
from gradsel.attached.steps import watch_optimizers

#: The attribute of a module with what attach() did to its parameters.
STATE = "_gradsel_attached"
#: What is wrong with a parameter of an attached model that accelerate has offloaded, and the way out.
OFFLOADED = (
    "is on the meta device, where accelerate leaves what it offloads (cpu_offload, disk_offload, dispatch_model): it "
    "puts another parameter there for every forward, which cannot be trained. Save the delta and call "
    "gradsel.detach(model) before a model is offloaded; now, accelerate.hooks.remove_hook_from_submodules(model) and "
    "then gradsel.detach(model) give back the trained model"
)
#: The attribute of the module that attach() was called on.
RECORD = "_gradsel_record"


class Attachments:
    """What attach() did to the parameters of one module, by their names in it.

    Attributes:
        flags: requires_grad before.
        partial: those trained in part.
        whole: those trained whole.
        differences: quantised ones that are trained in part.
        record: of the module that attach() was called on.
    """

    def __init__(self, module: nn.Module, record: Record) -> None:
        self.module = weakref.ref(module)
        self.record = record
        self.flags: dict[str, bool] = {}
        self.partial: dict[str, Selected] = {}
        self.whole: dict[str, Original] = {}
        self.differences: dict[str, Differences] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachments:
        module = memo[id(self.module())]
        made = Attachments(module, copy.deepcopy(self.record, memo))
        made.flags = dict(self.flags)
        for short, original in (self.partial | self.whole | self.differences).items():
            made.add(short, copy.deepcopy(original, memo))
        return made

    def __getstate__(self) -> dict[str, Any]:
        """With the weights and values, which are pickled as plain parameters, and their classes."""
        module = self.module()
        linked = [
            (parameter, type(parameter), vars(parameter)[LINK])
            for parameter in (() if module is None else module._parameters.values())
            if parameter is not None and LINK in vars(parameter)
        ]
        return {**vars(self), "module": module, "linked": linked}

    def __setstate__(self, state: dict[str, Any]) -> None:
        linked = state.pop("linked")
        vars(self).update(state, module=weakref.ref(state["module"]), partial={}, whole={}, differences={})
        for short, original in (state["partial"] | state["whole"] | state["differences"]).items():
            self.add(short, original)
        for parameter, kind, selected in linked:
            parameter.__class__ = kind
            vars(parameter)[LINK] = selected
        watch_optimizers()

    def frozen(self) -> set[str]:
        """The parameters that are not trained."""
        return self.flags.keys() - self.partial.keys() - self.whole.keys() - self.differences.keys()

    def add(self, short: str, original: Original) -> None:
        """Makes this module one of those that hold a parameter."""
        if isinstance(original, Selected):
            self.partial[short] = original
        elif isinstance(original, Differences):
            self.differences[short] = original
        else:
            self.whole[short] = original
        module = self.module()
        assert module is not None
        original.sites.append((weakref.ref(module), short))


@dataclass(eq=False)
class Record:
    """Kept by the module that attach() was called on.

    Attributes:
        trained: names of all trained parameters when attach() was called.
        resuming: the last load_state_dict() brought values: shards of the same checkpoint may follow.
        loading: the kind of checkpoint that is being loaded, "attached" or "plain".
        rebased: names of the parameters whose originals it has replaced so far.
        values_alone: names of the sharded weights of which it has the values only.
        ranks_agree: the masks of all ranks have been compared.
        converting: the model or a part of it is being cast or moved.
        keep_vars: what the state_dict() that is being made was asked for.
        sharded: those trained in part whose weights FSDP has sharded, by name.
    """

    trained: list[str]
    resuming: bool = False
    loading: str | None = None
    rebased: list[str] = field(default_factory=list)
    values_alone: set[str] = field(default_factory=set)
    ranks_agree: bool = False
    converting: bool = False
    keep_vars: bool = False
    sharded: dict[str, Selected] = field(default_factory=dict)


def masks_in(attachments: Attachments) -> dict[str, int]:
    """Fingerprints of the masks of a module's parameters that are trained in part, by their names in it."""
    masked: dict[str, Masked] = {**attachments.partial, **attachments.differences}
    return {short: each.fingerprint() for short, each in masked.items()}


def attachments_of(module: nn.Module) -> Attachments | None:
    """What attach() did to a module, if anything."""
    return vars(module).get(STATE)


def selected_in(module: nn.Module) -> dict[str, Selected]:
    """How the parameters of a module are trained in part, by their names in it; nothing in one that is not attached."""
    attachments = attachments_of(module)
    return {} if attachments is None else attachments.partial


def differences_in(module: nn.Module) -> dict[str, Differences]:
    """The quantised weights of a module that are trained in part, by their names in it."""
    attachments = attachments_of(module)
    return {} if attachments is None else attachments.differences


def is_attached(model: nn.Module) -> bool:
    """Whether attach() was called on the model, or on a module in or around it."""
    return any(attachments_of(module) is not None or RECORD in vars(module) for module in model.modules())


def attached_root(model: nn.Module) -> nn.Module | None:
    """The module that attach() was called on: the model or one inside it; None if there is none.

    Raises:
        ValueError: there are several.
    """
    roots = [module for module in model.modules() if RECORD in vars(module)]
    if len(roots) > 1:
        raise ValueError(f"{len(roots)} modules of the model are attached, each on its own; pass one of them")
    return roots[0] if roots else None


def require_present(root: nn.Module) -> None:
    """Refuses an attached model of which accelerate has offloaded trained parameters.

    Raises:
        ValueError: it names the first one.
    """
    absent: set[str] = set()
    for module in root.modules():
        attachments = attachments_of(module)
        for short, original in {} if attachments is None else (attachments.partial | attachments.whole).items():
            if (own := module._parameters.get(short)) is not None and own.is_meta:
                absent.add(original.name)
    if absent:
        raise ValueError(f"{min(absent)} {OFFLOADED}")


def require_complete(root: nn.Module, what: str) -> None:
    """Refuses an attached model from which trained parameters have disappeared, or that trains others.

    Raises:
        ValueError: it names them.
    """
    require_present(root)
    found: set[str] = set()
    unfrozen: set[str] = set()
    for path, module in root.named_modules():
        attachments = attachments_of(module)
        if attachments is not None:
            found |= {s.name for short, s in attachments.partial.items() if s.weight() is not None}
            found |= {d.name for short, d in attachments.differences.items() if short + SUFFIX in module._parameters}
            for short, original in attachments.whole.items():
                whole = module._parameters.get(short)
                if whole is not None and whole.shape == original.entries.shape:
                    found.add(original.name)
            unfrozen |= {
                f"{path}.{short}".lstrip(".")
                for short in attachments.frozen()
                if (parameter := module._parameters.get(short)) is not None and parameter.requires_grad
            }
    missing = [name for name in vars(root)[RECORD].trained if name not in found]
    if missing:
        raise ValueError(
            f"{what}: {len(missing)} trained parameters are no longer part of the model, or have another shape, first "
            f"{missing[0]}; put their modules back, or call gradsel.detach(model) and attach anew"
        )
    if unfrozen:
        raise ValueError(
            f"{what}: {len(unfrozen)} parameters that the selection freezes require grad now, first {min(unfrozen)}, "
            "so they may have been trained, and nobody knows what they were. To train one, name it in "
            "select(whole=[...]); if it has not been trained, parameter.requires_grad_(False); gradsel.export(model, "
            "path) writes all of the model as it is"
        )
