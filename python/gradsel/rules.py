"""Which parameters of a model are ranked, trained whole, or frozen, before any gradient is looked at."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TypedDict

from torch import nn
from typing_extensions import Unpack

from gradsel.blocks import is_inside, numbered
from gradsel.links import selected_in
from gradsel.views import NeuronView

#: Modules with one of these names anywhere in their path are the head.
HEAD = ("classifier", "head", "score", "fc")

#: What happens to each kind of parameter unless something else is asked for: the rules of GPS (Zhang et al., CVPR 2024)
#: as its authors' runs have them, and frozen embeddings.
KINDS = {
    "weight": "rank",  # matrices and convolutions, the patch embedding included
    "bias": "whole",
    "head": "whole",
    "layer scale": "whole",
    "position table": "whole",  # relative positions
    "normalisation": "freeze",
    "position embedding": "freeze",
    "token": "freeze",  # class tokens, mask tokens, registers
    "embedding": "freeze",
    "output embedding": "freeze",
    "other": "freeze",
}
_ACTIONS = ("rank", "whole", "freeze")

_NAMED_LIKE = {
    "token": re.compile(r"(cls|class|dist|distillation|mask|reg|register)_?(token|embed)\w*$"),
    "position table": re.compile(r"(relative_position_bias_table|rel_pos(_[hw])?)$"),
    "position embedding": re.compile(r"((pos|position|positional)_?emb\w*|absolute_pos\w*)$"),
    "layer scale": re.compile(r"(gamma(_\d+)?|lambda_?\d*|layer_scale\w*)$"),
}
_BIAS = re.compile(r"(^|.*_)bias(_\w+)?$")
_OUTPUT_EMBEDDING = (["lm_head"], ["embed_out"])
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Rule:
    """What happens to one parameter.

    Args:
        action: ``"rank"``, ``"whole"`` or ``"freeze"``.
        reason: why, in a few words.
        view: its neuron view, for ``"rank"``.
        named: the caller named it, so that not being able to follow is an error.
    """

    action: str
    reason: str
    view: NeuronView = field(default_factory=NeuronView)
    named: bool = False


class RuleOptions(TypedDict, total=False):
    """The arguments of :func:`parameter_rules` behind the model, as others pass them on."""

    head: Iterable[str]
    kinds: Mapping[str, str]
    blocks: Iterable[int] | None
    skip_blocks: Iterable[int]
    rank: Iterable[str]
    whole: Iterable[str]
    freeze: Iterable[str]


def parameter_rules(
    model: nn.Module,
    *,
    head: Iterable[str] = HEAD,
    kinds: Mapping[str, str] | None = None,
    blocks: Iterable[int] | None = None,
    skip_blocks: Iterable[int] = (),
    rank: Iterable[str] = (),
    whole: Iterable[str] = (),
    freeze: Iterable[str] = (),
) -> dict[str, Rule]:
    """One rule for every parameter of ``model``, by name.

    Args:
        model: any module, on any device. A parameter that several modules share is judged by all of them and named
            once.
        head: module names; parameters below such a module are of the kind ``"head"``.
        kinds: what happens to parameters of a kind, ``"rank"``, ``"whole"`` or ``"freeze"``, where that is not
            :data:`KINDS`, for example ``{"bias": "freeze", "normalisation": "whole"}``.
        blocks: numbers of the blocks (see :func:`gradsel.blocks.block_names`) to choose from; negative ones count from
            the last. Everything outside them but the head is frozen. None: the whole model.
        skip_blocks: numbers of blocks to freeze, as in GPS's block study.
        rank, whole, freeze: glob patterns on parameter names (``"blocks.0.*"``) that override all of the above. Where
            several match, rank goes before whole and whole before freeze, so that ``freeze=["*"]`` leaves what the
            other two name.

    Raises:
        ValueError: a pattern matches no parameter; an unknown kind or action; no such block; the model is attached.
    """
    if any(selected_in(module) for module in model.modules()):
        raise ValueError("the model is attached to a selection; call gradsel.detach(model) before selecting anew")
    owners = parameter_uses(model)
    overrides = {"rank": tuple(rank), "whole": tuple(whole), "freeze": tuple(freeze)}
    _check_patterns(model, overrides, [name for uses in owners.values() for name, _, _ in uses])
    actions = {**KINDS, **_checked_kinds(kinds or {})}
    kept = None if blocks is None else [strip_wrappers(path) for path in numbered(model, blocks, "blocks")]
    skipped = [strip_wrappers(path) for path in numbered(model, skip_blocks, "skip_blocks")]
    output = _output_embedding(model)
    rules = {}
    for canonical, uses in owners.items():
        names = [name for name, _, _ in uses]
        kind = _kind(uses, frozenset(head), output)
        rule = _default(kind, uses, actions)
        left_out = kept is not None and kind != "head" and not any(is_inside(name, kept) for name in names)
        if left_out or any(is_inside(name, skipped) for name in names):
            rule = Rule("freeze", "block left out")
        for action, patterns in overrides.items():
            if any(fnmatchcase(name, pattern) for name in names for pattern in patterns):
                rule = _named(action, uses)
                break
        rules[canonical] = rule
    return rules


def ranked_sizes(model: nn.Module, **options: Unpack[RuleOptions]) -> dict[str, tuple[int, int]]:
    """Rows and columns of the neuron view of every ranked parameter; arguments as in :func:`parameter_rules`."""
    rules = parameter_rules(model, **options)
    shapes = {strip_wrappers(name): parameter.shape for name, parameter in model.named_parameters()}
    return {name: rule.view.shape(shapes[name]) for name, rule in rules.items() if rule.action == "rank"}


def _check_patterns(model: nn.Module, overrides: Mapping[str, tuple[str, ...]], names: list[str]) -> None:
    for action, patterns in overrides.items():
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4)
                hint = f"; did you mean {', '.join(close)}?" if close else ""
                raise ValueError(f"{action}={pattern!r} matches no parameter of {type(model).__name__}{hint}")


def _checked_kinds(kinds: Mapping[str, str]) -> Mapping[str, str]:
    for kind, action in kinds.items():
        if kind not in KINDS:
            close = difflib.get_close_matches(kind, KINDS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"kinds names {kind!r}, expected one of {', '.join(KINDS)}{hint}")
        if action not in _ACTIONS:
            raise ValueError(f"kinds[{kind!r}] is {action!r}, expected one of {', '.join(_ACTIONS)}")
    return kinds


def _named(action: str, uses: list[Use]) -> Rule:
    name, module, short = uses[0]
    parameter = getattr(module, short)
    if action != "freeze" and not parameter.is_floating_point():
        raise ValueError(f"{action} names {name}, which cannot be trained: it is {parameter.dtype}")
    return Rule(action, "named", _view(uses), named=True)


Use = tuple[str, nn.Module, str]  # full name, owning module, name in it


def parameter_uses(model: nn.Module) -> dict[str, list[Use]]:
    """Every parameter by its first name, with all the places it is used in."""
    by_id: dict[int, tuple[str, list[Use]]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for short, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = strip_wrappers(f"{prefix}.{short}" if prefix else short)
            by_id.setdefault(id(parameter), (name, []))[1].append((name, module, short))
    order = {strip_wrappers(name): id(parameter) for name, parameter in model.named_parameters()}
    return {name: by_id[key][1] for name, key in order.items()}


def _kind(uses: list[Use], head: frozenset[str], output: nn.Module | None) -> str:
    """The kind of a parameter, a key of :data:`KINDS`."""
    modules = [module for _, module, _ in uses]
    if any(_is_norm(module) for module in modules):
        return "normalisation"
    own_names = [short for _, _, short in uses]
    parts = [name.split(".")[:-1] for name, _, _ in uses]
    if isinstance(modules[0], nn.Embedding):
        own_names += [part[-1] for part in parts if part]  # position_embeddings.weight
    for kind, pattern in _NAMED_LIKE.items():
        if any(pattern.match(name) for name in own_names):
            return kind
    if any(_is_embedding(module) for module in modules):
        return "embedding"
    if any(head.intersection(part) for part in parts):
        return "head"
    parameter = getattr(modules[0], uses[0][2])
    if parameter.ndim <= 2 and any(_BIAS.match(short) for _, _, short in uses):
        return "bias"
    if parameter.ndim < 2:
        return "other"
    if any(module is output for module in modules) or any(part[-1:] in _OUTPUT_EMBEDDING for part in parts):
        return "output embedding"
    return "weight"


def _output_embedding(model: nn.Module) -> nn.Module | None:
    """The layer from features to tokens, where the model says which one it is (transformers)."""
    ask = getattr(model, "get_output_embeddings", None)
    found = ask() if callable(ask) else None
    return found if isinstance(found, nn.Module) else None


def _default(kind: str, uses: list[Use], actions: Mapping[str, str]) -> Rule:
    _, module, short = uses[0]
    parameter = getattr(module, short)
    if not parameter.is_floating_point():
        return Rule("freeze", f"{parameter.dtype}".removeprefix("torch."))
    reason = "neither weight nor bias" if kind == "other" else kind
    if kind == "embedding" and len(uses) > 1:
        reason += ", tied"
    return Rule(actions[kind], reason, _view(uses))


def _view(uses: list[Use]) -> NeuronView:
    _, module, short = uses[0]
    parameter = getattr(module, short)
    if isinstance(module, _TRANSPOSED):
        return NeuronView((0, 2), module.groups) if module.groups > 1 else NeuronView((1,))
    if is_transposed_linear(module):
        return NeuronView((1,))
    if parameter.ndim == 3 and not isinstance(module, (nn.modules.conv._ConvNd, nn.Bilinear)):
        return NeuronView((0, 2) if _has_transposed_experts(module) else (0, 1))
    return NeuronView((0,))


def _has_transposed_experts(module: nn.Module) -> bool:
    """Whether stacked experts are stored as [experts, in, out], as transformers does in some models."""
    return bool(getattr(module, "is_transposed", False)) or type(module).__name__ == "Llama4TextExperts"


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether it is the ``Conv1D`` of transformers: a Linear whose weight is stored as [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _is_embedding(module: nn.Module) -> bool:
    name = type(module).__name__
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or name.endswith(("Embedding", "Embeddings"))


def strip_wrappers(name: str) -> str:
    """A parameter's name without the parts that DistributedDataParallel and torch.compile put into it."""
    return ".".join(_unwrapped(name.split(".")))


def _unwrapped(parts: list[str]) -> Iterator[str]:
    leading = True
    for part in parts:
        if part == "_orig_mod" or (leading and part == "module"):
            continue
        leading = False
        yield part
