"""Where in a model methods change something: matrices, queries and values, the outputs of attention and MLP."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import nn

from gradsel.methods.base import NO_PARTS, Parts
from gradsel.parameters.blocks import block_names
from gradsel.parameters.rules import HEAD, Rule, is_transposed_linear, parameter_rules

#: What models call the layers of queries and values, and those of fused queries, keys and values.
_QUERIES_AND_VALUES = re.compile(r"(q|v|query|value|q_proj|v_proj|q_lin|v_lin|qkv|Wqkv|c_attn|query_key_value)")
_ATTENTION = re.compile(r"attn|attention|self_attn|self_attention")
_PATCH_EMBEDDING = re.compile(r"patch_?embed\w*|conv_proj|stem\w*|embeddings")


def matrices(model: nn.Module, head: Iterable[str] = HEAD, parts: Parts = NO_PARTS) -> list[str]:
    """The linear layers that GPS would rank, by path; in a model without, its convolutions without groups.

    Raises:
        ValueError: there are neither.
    """
    rules = parameter_rules(model, **parts.rules(head))
    ranked = {name.rpartition(".")[0] for name, rule in rules.items() if _ranks(rule)}
    modules = {path: module for path, module in model.named_modules() if path in ranked}
    linear = [path for path, module in modules.items() if is_linear(module)]
    convolutions = [path for path, m in modules.items() if isinstance(m, nn.Conv2d) and m.groups == 1]
    if not (linear or convolutions):
        raise ValueError(f"{type(model).__name__} has no linear layer or convolution to adapt")
    return linear or convolutions


def _ranks(rule: Rule) -> bool:
    return rule.action == "rank"


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer, also one of transformers that stores its weight as [in, out]."""
    return isinstance(module, nn.Linear) or is_transposed_linear(module)


def queries_and_values(paths: Iterable[str], model: nn.Module) -> list[str]:
    """Those of some layers that make queries and values, or queries, keys and values by one fused matrix.

    Raises:
        ValueError: there are none.
    """
    found = [path for path in paths if _QUERIES_AND_VALUES.fullmatch(path.rpartition(".")[2])]
    if not found:
        raise ValueError(f"layers is 'attention', but {type(model).__name__} has no layers of queries and values")
    return found


def whole_modules(rules: Mapping[str, Rule], parameters: Iterable[str] = ()) -> list[str]:
    """The modules of the head, by path; those of some further parameters, by name, are among them."""
    inside = [*parameters, *(name for name, rule in rules.items() if rule.reason == "head")]
    return sorted({name.rpartition(".")[0] for name in inside} - {""})


def mlp_outputs(model: nn.Module) -> list[str]:
    """The last linear layer of every block, which is that of its MLP.

    Raises:
        ValueError: the model has no blocks, or blocks without a linear layer.
    """
    return [_last_linear(model, path, "linear layer") for path in _blocks(model)]


def attention_outputs(model: nn.Module) -> list[str]:
    """The last linear layer of the attention of every block.

    Raises:
        ValueError: the model has no blocks, or blocks without attention.
    """
    return [_last_linear(model, attention_in(model, path), "attention") for path in _blocks(model)]


def attention_in(model: nn.Module, block: str) -> str:
    """The path of the attention of a block.

    Raises:
        ValueError: it has none.
    """
    for name, _ in model.get_submodule(block).named_children():
        if _ATTENTION.fullmatch(name):
            return f"{block}.{name}"
    raise ValueError(f"{type(model).__name__} has no attention in its block {block}")


def is_patch_embedding(name: str) -> bool:
    """Whether a parameter belongs to the layers in front of the blocks that see pixels."""
    return any(_PATCH_EMBEDDING.fullmatch(part) for part in name.split(".")[:-1])


def require_calls(model: nn.Module, method: str) -> None:
    """Refuses models that use layers without calling them, so that nothing could be added behind these.

    Raises:
        ValueError: the model has torch's own attention.
    """
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            raise ValueError(
                f"{method} cannot be added to {type(model).__name__}: {path} is nn.MultiheadAttention, which uses its "
                "output layer without calling it; take a model of timm or transformers"
            )


def _blocks(model: nn.Module) -> list[str]:
    names = block_names(model)
    if not names:
        raise ValueError(f"{type(model).__name__} has no repeated blocks")
    return names


def _last_linear(model: nn.Module, path: str, what: str) -> str:
    # A 1x1 convolution is a linear layer; ConvNeXt's MLP has either.
    inside = [
        name
        for name, module in model.get_submodule(path).named_modules()
        if is_linear(module) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1)
    ]
    if not inside:
        raise ValueError(f"{type(model).__name__} has no {what} in its block {path}")
    return f"{path}.{inside[-1]}"
