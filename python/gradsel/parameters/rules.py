"""Which parameters of a model are ranked, trained whole or frozen, before any gradient is computed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, TypedDict, cast

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from typing_extensions import Unpack

from gradsel.attached import is_attached
from gradsel.errors import did_you_mean
from gradsel.parameters.adapters import adapter_tensors
from gradsel.parameters.blocks import is_inside, numbered
from gradsel.parameters.names import (
    Use,
    has_part,
    parameter_uses,
    shaped_parameters,
    strings,
    strip_wrappers,
)
from gradsel.parameters.trainable import is_reduced, why_untrainable
from gradsel.quantised import opaque_layers, quantised_weight, weight_parameter, why_opaque, why_unknown
from gradsel.sharding import is_sharded
from gradsel.views import NeuronView

#: Modules with one of these names anywhere in their path are the head.
HEAD = ("classifier", "head", "score", "fc")

#: What happens to each kind of parameter by default: the rules of GPS (Zhang et al., CVPR 2024), as its authors ran it,
#: and frozen embeddings.
KINDS = {
    "weight": "rank",  # matrices and convolutions, the patch embedding included
    "bias": "whole",
    "head": "whole",
    "layer scale": "whole",
    "position table": "whole",  # relative positions
    "normalisation": "freeze",
    "position embedding": "freeze",
    "token": "freeze",  # class tokens, mask tokens, registers, queries
    "embedding": "freeze",
    "output embedding": "freeze",
    "router": "freeze",  # of a mixture of experts
    "adapter": "whole",  # of PEFT, if it is active
    "other": "freeze",
}
_ACTIONS = ("rank", "whole", "freeze")

_NAMED_LIKE = {
    "token": re.compile(r"(cls|class|dist|distillation|mask|iou|query|reg|register)_?(token|embed)\w*$"),
    "position table": re.compile(
        r"(relative_position_bias_table|relative_attention_bias|attention_biases|rel_pos(_[hwt])?)$"
    ),
    "position embedding": re.compile(r"((pos|position|positional)_?emb\w*|absolute_pos\w*|embed_positions|wpe)$"),
    "layer scale": re.compile(r"(gamma(_\d+)?|lambda_?\d*|layer_scale\w*)$"),
}
_BIAS = re.compile(r"(^|.*_)bias(_\w+)?$")
_OUTPUT_EMBEDDING = (["lm_head"], ["embed_out"])
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
#: Layers that multiply by their weight, whatever a subclass of them is called.
_PRODUCTS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
#: Classes whose weights are stored as [in, out] or [experts, in, out], although nothing else in them shows it.
_INPUTS_FIRST = (
    "Llama4TextExperts",
    "GroupedLinearLayer",  # ConvBERT
    "Gemma3MultiModalProjector",
    "T5Gemma2MultiModalProjector",
)
#: What the router is called in the modules that hold experts.
_ROUTERS = ("gate", "router", "shared_expert_gate")
#: Bare parameters [in, out] that CLIP and its successors multiply by from the right.
_PROJECTION = re.compile(r"((text|image|visual|prompts_visual)_projection|proj)$")


@dataclass(frozen=True)
class Rule:
    """What happens to one parameter.

    Args:
        action: ``"rank"``, ``"whole"`` or ``"freeze"``.
        reason: why, in a few words.
        view: its neuron view, for ``"rank"``.
        named: the caller named the parameter, so a rule that cannot be followed is an error.
        blocked: it would be ranked, but is quantised or sharded; ``reason`` says how.
    """

    action: str
    reason: str
    view: NeuronView = field(default_factory=NeuronView)
    named: bool = False
    blocked: bool = False


class RuleOptions(TypedDict, total=False):
    """The keyword arguments of :func:`parameter_rules`, for functions that pass them on."""

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
        model: any module, on any device. A parameter shared by several modules gets one rule, to which all its uses
            contribute.
        head: names of modules or bare parameters, with one part or several (``"decoder.classifier"``), anywhere in the
            model. These and everything below them, except norms and embeddings, are of the kind ``"head"``.
        kinds: overrides :data:`KINDS`, what happens to each kind (``"rank"``, ``"whole"`` or ``"freeze"``), for example
            by ``{"bias": "freeze", "normalisation": "whole"}``.
        blocks: numbers of the blocks to choose from (see :func:`gradsel.parameters.blocks.block_names`); negative
            ones count from the last. Everything outside them except the head is frozen. None: the whole model.
        skip_blocks: numbers of blocks to freeze, as in GPS's block study.
        rank, whole, freeze: glob patterns on parameter names (``"blocks.0.*"``) that override all of the above. If
            several match, rank takes precedence over whole and whole over freeze, so ``freeze=["*"]`` does not affect
            parameters that the other two name.

    In a model of PEFT, the base is ranked, and what its active adapters train (LoRA's A and B, for example, and copies
    in ``modules_to_save``) is of the kind ``"adapter"``. Here, ``requires_grad`` tells which adapters are active.

    A parameter without dimensions is a single number rather than a layer of neurons, so it is trained whole instead of
    ranked.

    Raises:
        ValueError: a pattern matches no parameter; ``head`` names nothing; a kind, action or block does not exist; two
            parameters have the same name; or the model is attached.
    """
    if is_attached(model):
        raise ValueError("the model is attached to a selection; call gradsel.detach(model) before selecting again")
    owners = parameter_uses(model)
    overrides = {"rank": strings(rank), "whole": strings(whole), "freeze": strings(freeze)}
    all_names = [name for uses in owners.values() for name, _, _ in uses]
    opaque = list(opaque_layers(model))
    _require_no_opaque(opaque, overrides["freeze"])
    all_names += [codes for codes, _ in opaque]
    _check_patterns(model, overrides, all_names)
    heads = strings(head)
    if heads != HEAD:
        _check_head(model, heads, all_names)
    actions = {**KINDS, **_checked_kinds(kinds or {})}
    kept = None if blocks is None else [strip_wrappers(path) for path in numbered(model, blocks, "blocks")]
    skipped = [strip_wrappers(path) for path in numbered(model, skip_blocks, "skip_blocks")]
    outputs, routers, adapters = _output_embeddings(model), _routers(model), adapter_tensors(model)
    rules = {}
    for canonical, uses in owners.items():
        names = [name for name, _, _ in uses]
        what = adapters.get(id(weight_parameter(*uses[0][1:])))
        kind = "adapter" if what else _kind(uses, heads, outputs, routers)
        rule = _of_adapter(what, uses, actions) if what else _default(kind, uses, actions)
        left_out = (
            kept is not None and kind not in ("head", "adapter") and not any(is_inside(name, kept) for name in names)
        )
        if left_out or any(is_inside(name, skipped) for name in names):
            rule = Rule("freeze", "block left out")
        for action, patterns in overrides.items():
            if any(fnmatchcase(name, pattern) for name in names for pattern in patterns):
                rule = _named(action, uses)
                break
        rules[canonical] = rule
    return rules


def ranked_sizes(model: nn.Module, **options: Unpack[RuleOptions]) -> dict[str, tuple[int, int]]:
    """Rows and columns of the neuron view of every ranked parameter; takes the arguments of :func:`parameter_rules`."""
    return sizes_of(parameter_rules(model, **options), shaped_parameters(model))


def sizes_of(rules: Mapping[str, Rule], parameters: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Rows and columns of the neuron view of every parameter that these rules rank."""
    return {name: rule.view.shape(parameters[name].shape) for name, rule in rules.items() if rule.action == "rank"}


def _require_no_opaque(opaque: list[tuple[str, nn.Module]], freeze: tuple[str, ...]) -> None:
    """Refuses quantised layers whose weight is no parameter, unless they are frozen by name."""
    found = [each for each in opaque if not any(fnmatchcase(each[0], pattern) for pattern in freeze)]
    if found:
        codes, layer = found[0]
        short = codes.rpartition(".")[2]
        patterns = [name for name, _ in found] if short == "weight" else [f"*.{short}"]  # others have weights, too
        listed = ", ".join(map(repr, patterns[:3])) + (", ..." if len(patterns) > 3 else "")
        raise ValueError(
            f"{len(found)} quantised layers hold their weights where they cannot be trained, first {codes} of a "
            f"{type(layer).__name__}: {why_opaque(layer)}. Or freeze these layers by name and train the others: "
            f"freeze=[{listed}]"
        )


def _check_patterns(model: nn.Module, overrides: Mapping[str, tuple[str, ...]], names: list[str]) -> None:
    for action, patterns in overrides.items():
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                hint = did_you_mean(pattern, names)
                raise ValueError(f"{action}={pattern!r} matches no parameter of {type(model).__name__}{hint}")


def _check_head(model: nn.Module, heads: tuple[str, ...], names: list[str]) -> None:
    if heads and not any(has_part(name, heads) for name in names):
        hint = did_you_mean(heads[0], dict.fromkeys(part for name in names for part in name.split(".")))
        raise ValueError(f"head={list(heads)} names no module or parameter of {type(model).__name__}{hint}")


def _checked_kinds(kinds: Mapping[str, str]) -> Mapping[str, str]:
    for kind, action in kinds.items():
        if kind not in KINDS:
            hint = did_you_mean(kind, KINDS)
            raise ValueError(f"kinds names {kind!r}, expected one of {', '.join(KINDS)}{hint}")
        if action not in _ACTIONS:
            raise ValueError(f"kinds[{kind!r}] is {action!r}, expected one of {', '.join(_ACTIONS)}")
    return kinds


def _named(action: str, uses: list[Use]) -> Rule:
    name, module, short = uses[0]
    parameter = weight_parameter(module, short)
    if action == "whole" and quantised_weight(module, short) is not None:
        raise ValueError(
            f"whole names {name}, which is quantised: a choice of its entries can be trained, as differences (name it "
            "in rank), but not all; to train it whole, leave it out when the model is quantised (transformers: "
            "llm_int8_skip_modules)"
        )
    if action != "freeze" and (found := _obstacle(module, short, parameter)) is not None:
        raise ValueError(f"{action} names {name}, which cannot be trained: it is {found}")
    return Rule(_feasible(action, parameter), "named", _view(uses), named=True)


def _feasible(action: str, parameter: Tensor) -> str:
    return "whole" if action == "rank" and parameter.ndim == 0 else action


def _kind(uses: list[Use], heads: tuple[str, ...], outputs: list[nn.Module], routers: list[nn.Module]) -> str:
    """The kind of a parameter, a key of :data:`KINDS`."""
    modules = [module for _, module, _ in uses]
    if any(_is_norm(module) for module in modules):
        return "normalisation"
    own_names = [short for _, _, short in uses]
    parts = [name.split(".")[:-1] for name, _, _ in uses]
    own_names += [  # position_embeddings.weight
        part[-1] for part, module in zip(parts, modules, strict=True) if part and isinstance(module, nn.Embedding)
    ]
    for kind, pattern in _NAMED_LIKE.items():
        if any(pattern.match(name) for name in own_names):
            return kind
    if any(type(module).__name__.endswith("LayerScale") for module in modules):
        return "layer scale"
    if any(_is_embedding(module) for module in modules):
        return "embedding"
    if any(has_part(name, heads) for name, _, _ in uses):
        return "head"
    if any(module in routers for module in modules):
        return "router"
    parameter = weight_parameter(*uses[0][1:])
    if any(_is_bias(parameter, module, short) for _, module, short in uses):
        return "bias"
    if parameter.ndim < 2 or _is_broadcast(parameter, modules[0]):
        return "other"
    if any(module in outputs for module in modules) or any(part[-1:] in _OUTPUT_EMBEDDING for part in parts):
        return "output embedding"
    return "weight"


def _is_bias(parameter: Tensor, module: nn.Module, short: str) -> bool:
    return bool(_BIAS.match(short)) and (parameter.ndim <= 2 or _is_broadcast(parameter, module))


def _is_broadcast(parameter: Tensor, module: nn.Module) -> bool:
    """Whether it is a vector or number with extra dimensions of size 1 for broadcasting: logit scales, biases."""
    return parameter.ndim > 2 and parameter.numel() == max(parameter.shape) and not isinstance(module, _PRODUCTS)


def _output_embeddings(model: nn.Module) -> list[nn.Module]:
    """The layers from features to tokens that the model, or a model inside it, reports (transformers)."""
    found = []
    for module in model.modules():
        ask = getattr(module, "get_output_embeddings", None)
        output = ask() if callable(ask) else None
        if isinstance(output, nn.Module):
            found.append(output)
    return found


def _routers(model: nn.Module) -> list[nn.Module]:
    """The layers that send tokens to experts: named as such, beside the experts of one module."""
    found = [module for module in model.modules() if type(module).__name__.endswith("Router")]
    for module in model.modules():
        if isinstance(getattr(module, "experts", None), nn.Module):
            children = dict(module.named_children())
            found += [children[name] for name in _ROUTERS if name in children]
    return [inner for router in found for inner in router.modules()]


def _default(kind: str, uses: list[Use], actions: Mapping[str, str]) -> Rule:
    _, module, short = uses[0]
    parameter = weight_parameter(module, short)
    if actions[kind] == "whole" and quantised_weight(module, short) is not None:
        found = (
            f"a quantised {kind}, of which a choice of entries can be trained (rank=[...]), but not all; or leave it "
            "out when the model is quantised (transformers: llm_int8_skip_modules)"
        )
        return Rule("freeze", found, blocked=True)
    if (found := _obstacle(module, short, parameter)) is not None:  # type: ignore[assignment]
        return Rule("freeze", found, blocked=actions[kind] != "freeze" and is_reduced(parameter, short))
    reason = "neither weight nor bias" if kind == "other" else kind
    if kind == "embedding" and len(uses) > 1:
        reason += ", tied"
    return Rule(_feasible(actions[kind], parameter), reason, _view(uses))


def _obstacle(module: nn.Module, short: str, parameter: Tensor) -> str | None:
    """Why no entries of a parameter can be ranked or trained; None if they can, if need be as differences."""
    if quantised_weight(module, short) is not None:
        return "quantised and sharded" if is_sharded(parameter) else None
    if (found := why_untrainable(parameter, sharded=True)) is None:
        return None
    hint = why_unknown(module, parameter)
    return found if hint is None else f"{found}; {hint}"


def _of_adapter(what: str, uses: list[Use], actions: Mapping[str, str]) -> Rule:
    """The rule of what PEFT has added or replaced; only what it trains now is trained."""
    _, module, short = uses[0]
    if what == "replaced":
        return Rule("freeze", "PEFT trains a copy")
    if not weight_parameter(module, short).requires_grad:
        return Rule("freeze", "inactive adapter")
    return _default("adapter", uses, actions)


def _view(uses: list[Use]) -> NeuronView:
    _, module, short = uses[0]
    parameter = weight_parameter(module, short)
    kind = type(module).__name__
    if parameter.ndim < 2 or _is_bias(parameter, module, short):
        return NeuronView(tuple(range(parameter.ndim)))  # one number per neuron, also for stacked experts
    if isinstance(module, _TRANSPOSED):
        return _inputs_first(module.groups)
    if kind == "DbrxExpertGLU" and short == "w2":  # [experts * in, out]
        return _inputs_first(cast(Any, module).moe_num_experts)
    if isinstance(module, (*_PRODUCTS, ParametrizationList)):
        return NeuronView((0,))
    if parameter.ndim == 3:  # stacked experts
        transposed = kind in _INPUTS_FIRST or getattr(module, "is_transposed", False)  # transformers' own flag
        return NeuronView((0, 2) if transposed else (0, 1))
    if parameter.ndim == 2 and (is_transposed_linear(module) or kind in _INPUTS_FIRST or _PROJECTION.match(short)):
        return _inputs_first()
    return NeuronView((0,))


def _inputs_first(groups: int = 1) -> NeuronView:
    """The view of a weight [groups * in, out, ...]."""
    return NeuronView((0, 2), groups) if groups > 1 else NeuronView((1,))


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether it is the ``Conv1D`` of transformers: a Linear whose weight is stored as [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _is_norm(module: nn.Module) -> bool:
    name = type(module).__name__
    named = "norm" in name.lower() or name.endswith("GRN")  # global response normalisation
    return isinstance(module, _NORMS) or (named and not isinstance(module, _PRODUCTS))


def _is_embedding(module: nn.Module) -> bool:
    named = type(module).__name__.endswith(("Embedding", "Embeddings"))
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or (named and not isinstance(module, _PRODUCTS))
