"""Pooled features of a model, the input of its head, found for each family of models."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradsel.parameters.names import has_part, unwrapped
from gradsel.parameters.rules import HEAD
from gradsel.ranking.preserving import eagerly


class Features:
    """``features(model, inputs)``, which returns [batch, dim].

    Attributes:
        how: where the features come from, in words.
    """

    def __init__(self, how: str, function: Callable[[Any, Any], Tensor]) -> None:
        self.how = how
        self._function = function

    def __call__(self, model: Any, inputs: Any) -> Tensor:
        found = self._function(unwrapped(model), inputs)
        if found.ndim != 2:
            raise ValueError(
                f"{self.how} gave features {list(found.shape)}, expected [batch, dim]; pass a function of your own, "
                "contrastive(lambda model, inputs: ...)"
            )
        return found

    def __repr__(self) -> str:
        return f"Features({self.how})"


def features(model: nn.Module) -> Features:
    """The function that computes a model's pooled features, for :func:`gradsel.contrastive`.

    - timm: ``forward_head(forward_features(x), pre_logits=True)``.
    - transformers, models with a ``score`` layer (Llama, Qwen, GPT-2): the last hidden state of the last token that is
      not padding.
    - transformers, all others: the pooler's output if there is one, else the class token (the first token of a text),
      else the mean over tokens or pixels.
    - A model whose ``forward_features`` returns [batch, dim]: that.
    - Anything else: the input of the last linear layer below a module named like a head.

    Args:
        model: wrapped in DistributedDataParallel or torch.compile, or not.

    Returns:
        ``features(model, inputs) -> [batch, dim]``. Inputs are a tensor, or for transformers a mapping or a tensor that
        is the model's main input.

    Raises:
        ValueError: the model has no part that is recognised as a head.
    """
    model = unwrapped(model)
    if callable(getattr(model, "forward_head", None)) and callable(getattr(model, "forward_features", None)):
        return Features("timm's forward_head(pre_logits=True)", _timm)
    if isinstance(getattr(model, "base_model", None), nn.Module) and hasattr(model, "config"):
        if model.base_model is model:
            return Features("the pooled output", _pooled)
        if isinstance(getattr(model, "score", None), nn.Module):
            return Features("the last hidden state of the last real token", _last_token)
        return Features("the pooler's output, class token or mean", _pooled)
    if callable(getattr(model, "forward_features", None)):
        return Features("forward_features", lambda model, inputs: model.forward_features(_tensor(inputs)))
    if (name := _head_name(model)) is None:
        raise ValueError(
            f"no features are known for {type(model).__name__}: it is of no known family, and has no linear layer in "
            f"a module named {', '.join(HEAD)}; pass a function, contrastive(lambda model, inputs: ...)"
        )
    return Features(f"the input of {name}", lambda model, inputs: _input_of(model, name, inputs))


def _timm(model: Any, inputs: Any) -> Tensor:
    found: Tensor = model.forward_head(model.forward_features(_tensor(inputs)), pre_logits=True)
    return found


def _tensor(inputs: Any) -> Any:
    """The only tensor of a mapping."""
    if isinstance(inputs, Mapping):
        if len(inputs) != 1:
            raise ValueError(f"the model takes one tensor, the batch has {', '.join(map(repr, inputs))}")
        return next(iter(inputs.values()))
    return inputs


def _run_base(model: Any, inputs: Any) -> Any:
    base = model.base_model
    if not isinstance(inputs, Mapping):
        inputs = {getattr(base, "main_input_name", "input_ids"): inputs}
    accepted = inspect.signature(base.forward).parameters
    return base(**{name: value for name, value in inputs.items() if name in accepted})


def _last_token(model: Any, inputs: Any) -> Tensor:
    hidden: Tensor = _run_base(model, inputs).last_hidden_state
    given = inputs if isinstance(inputs, Mapping) else {"input_ids": inputs}
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    pad = getattr(model.config, "pad_token_id", None)
    if mask is not None:
        real = mask.bool()
    elif ids is not None and pad is not None:
        real = ids != pad
    else:
        real = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    places = torch.arange(real.shape[1], device=real.device)
    return hidden[torch.arange(len(hidden), device=hidden.device), (real * places).argmax(1)]


def _pooled(model: Any, inputs: Any) -> Tensor:
    outputs = _run_base(model, inputs)
    if (pooled := getattr(outputs, "pooler_output", None)) is not None:
        return pooled.flatten(1)
    hidden = outputs.last_hidden_state
    if hidden.ndim == 4:
        return hidden.mean((2, 3))
    if getattr(model.base_model, "main_input_name", "input_ids") == "input_ids":
        return hidden[:, 0]
    if any(name.rpartition(".")[2] == "cls_token" for name, _ in model.named_parameters()):
        return hidden[:, 0]
    return hidden.mean(1)


def _head_name(model: nn.Module) -> str | None:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and has_part(name, HEAD)]
    return names[-1] if names else None


class _Found(Exception):
    """Ends a forward at the head: what comes after it is not needed."""


def _input_of(model: nn.Module, name: str, inputs: Any) -> Tensor:
    caught: list[Tensor] = []

    def catch(module: nn.Module, args: tuple) -> None:
        caught.append(args[0])
        raise _Found

    handle = model.get_submodule(name).register_forward_pre_hook(catch)
    try:
        with eagerly():  # compiled code would not call the hook
            model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    except _Found:
        pass
    finally:
        handle.remove()
    if not caught:
        raise ValueError(f"{type(model).__name__} did not call its head {name}; pass a function of your own")
    return caught[0]
