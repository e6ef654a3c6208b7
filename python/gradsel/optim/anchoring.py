"""Which weights GRFT pulls towards their pre-trained values: its regular set."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from gradsel.parameters.blocks import block_names, is_inside
from gradsel.parameters.names import has_part, strings, strip_wrappers
from gradsel.parameters.rules import HEAD

_PATCH_EMBEDDING = re.compile(r"patch_?embed\w*|conv_proj")  # conv_proj in torchvision


def anchored_groups(
    model: nn.Module, anchor: float, last_blocks: int | str = "all", *, head: Iterable[str] = HEAD
) -> list[dict[str, Any]]:
    """Parameter groups for :class:`~gradsel.MaskedAdam` with GRFT's anchor (Alg. 1, line 8).

    GRFT's regular set consists of the last blocks, the patch embedding and the head. Trained values in it get
    ``anchor``, all others no anchor.

    Args:
        model: an attached model, or one with flags set by :func:`gradsel.freeze`. The groups hold the parameters that
            require gradients, with their names.
        anchor: strength of the pull, GRFT's lambda.
        last_blocks: number of blocks, counted from the last (see
            :func:`gradsel.parameters.blocks.block_names`), or ``"all"`` for the whole model.
        head: module names, as in :func:`gradsel.parameters.rules.parameter_rules`.

    Raises:
        ValueError: the model has fewer blocks, or no parameter requires gradients.
    """
    last = regular_blocks(model, last_blocks)
    heads = strings(head)

    def is_regular(name: str) -> bool:
        name = strip_wrappers(name)
        patches = any(_PATCH_EMBEDDING.fullmatch(part) for part in name.split(".")[:-1])
        return last_blocks == "all" or patches or has_part(name, heads) or is_inside(name, last)

    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("no parameter requires gradients; call gradsel.attach(model, selection) first")
    groups = [
        {"params": [item for item in trained if is_regular(item[0])], "anchor": anchor},
        {"params": [item for item in trained if not is_regular(item[0])], "anchor": 0.0},
    ]
    return [group for group in groups if group["params"]]


def regular_blocks(model: nn.Module, last_blocks: int | str, setting: str = "last_blocks") -> list[str]:
    """The paths of the last blocks.

    Args:
        last_blocks: as for :func:`anchored_groups`.
        setting: what the message of an error calls it.

    Raises:
        ValueError: the model has fewer blocks.
    """
    names = [strip_wrappers(path) for path in block_names(model)]
    if last_blocks == "all":
        return names
    if type(last_blocks) is not int or not 0 <= last_blocks <= len(names):
        raise ValueError(f"{setting} must be 'all' or 0 to {len(names)}, the blocks there are, got {last_blocks!r}")
    return names[len(names) - last_blocks :]
