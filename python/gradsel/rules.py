"""Which parameters of a model are ranked, trained whole, or frozen, before any gradient is looked at.

The defaults are those of GPS (Zhang et al., CVPR 2024, and its authors' runs): every weight matrix and convolution of
the backbone is ranked, the patch embedding included; biases outside normalisation layers and the head train whole, as
do layer scales and relative-position tables; normalisation, position embeddings, class tokens and (token) embeddings
stay frozen.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

from gradsel.links import selected_in
from gradsel.views import NeuronView

#: Modules with one of these names anywhere in their path are the head.
HEAD = ("classifier", "head", "score", "fc")

_TOKEN = re.compile(
    r"((pos|position|positional)_?emb\w*|(cls|class|dist|mask|reg|register)_?(token|embed)\w*|absolute_pos\w*)$"
)
_LAYER_SCALE = re.compile(r"(gamma(_\d+)?|lambda_?\d*|layer_scale\w*)$")
_POSITION_TABLE = "relative_position_bias_table"
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


def parameter_rules(
    model: nn.Module,
    *,
    head: Iterable[str] = HEAD,
    rank: Iterable[str] = (),
    whole: Iterable[str] = (),
    freeze: Iterable[str] = (),
) -> dict[str, Rule]:
    """One rule for every parameter of ``model``, by name.

    Args:
        model: any module. A parameter that several modules share is judged by all of them and named once.
        head: module names; parameters below such a module train whole.
        rank, whole, freeze: glob patterns on parameter names (``"blocks.0.*"``) that override the defaults. Where
            several match, rank goes before whole and whole before freeze, so that ``freeze=["*"]`` leaves what the
            other two name.

    Raises:
        ValueError: a pattern matches no parameter.
    """
    if any(selected_in(module) for module in model.modules()):
        raise ValueError("the model is attached to a selection; call gradsel.detach(model) before selecting anew")
    owners = parameter_uses(model)
    names = [name for uses in owners.values() for name, _, _ in uses]
    overrides = {"rank": tuple(rank), "whole": tuple(whole), "freeze": tuple(freeze)}
    for action, patterns in overrides.items():
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4)
                hint = f"; did you mean {', '.join(close)}?" if close else ""
                raise ValueError(f"{action}={pattern!r} matches no parameter of {type(model).__name__}{hint}")
    rules = {}
    for canonical, uses in owners.items():
        rule = _default(uses, frozenset(head))
        for action, patterns in overrides.items():
            if any(fnmatchcase(name, pattern) for name, _, _ in uses for pattern in patterns):
                rule = _named(action, uses)
                break
        rules[canonical] = rule
    return rules


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


def _default(uses: list[Use], head: frozenset[str]) -> Rule:
    modules = [module for _, module, _ in uses]
    shorts = {short for _, _, short in uses}
    parameter = getattr(modules[0], uses[0][2])
    if not parameter.is_floating_point():
        return Rule("freeze", f"{parameter.dtype}".removeprefix("torch."))
    if any(_is_embedding(module) for module in modules):
        return Rule("freeze", "embedding" if len(uses) == 1 else "embedding, tied")
    if any(_is_norm(module) for module in modules):
        return Rule("freeze", "normalisation")
    if any(part in head for name, _, _ in uses for part in name.split(".")[:-1]):
        return Rule("whole", "head")
    if any(_TOKEN.search(short) for short in shorts):
        return Rule("freeze", "position embedding or class token")
    if _POSITION_TABLE in shorts:
        return Rule("whole", "relative-position table")
    if any(_LAYER_SCALE.match(short) for short in shorts):
        return Rule("whole", "layer scale")
    if any(re.search(r"bias(_\w+)?$", short) for short in shorts) and parameter.ndim <= 2:
        return Rule("whole", "bias")
    if parameter.ndim >= 2:
        return Rule("rank", "weight", _view(uses))
    return Rule("freeze", "neither weight nor bias")


def _view(uses: list[Use]) -> NeuronView:
    _, module, short = uses[0]
    parameter = getattr(module, short)
    if isinstance(module, _TRANSPOSED):
        return NeuronView((0, 2), module.groups) if module.groups > 1 else NeuronView((1,))
    if is_transposed_linear(module):
        return NeuronView((1,))
    if parameter.ndim == 3 and not isinstance(module, (nn.modules.conv._ConvNd, nn.Bilinear)):
        return NeuronView((0, 1))  # stacked experts [experts, out, in]
    return NeuronView((0,))


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
