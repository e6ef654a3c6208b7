"""The blocks of a model, its repeated parts, found from its modules or from the names of its parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from torch import nn

#: A part of a name that numbers its module: ``3``, ``encoder_layer_3``.
_NUMBER = re.compile(r"(.*_)?\d+")


def block_names(model: nn.Module) -> list[str]:
    """The paths of all blocks in model order, for example ``blocks.0`` to ``blocks.11``.

    Blocks are the modules of an outermost ``ModuleList`` or ``Sequential`` that holds modules of one class. The stages
    of a hierarchical network (Swin, ConvNeXt, ResNet) are not blocks themselves, but each of their blocks is one. GPS's
    block study and GRFT's regular layers count them this way.
    """
    return list(_blocks("", model))


def _blocks(path: str, module: nn.Module) -> Iterator[str]:
    is_stack = _is_stack(module)
    for name, child in module.named_children():
        inner = f"{path}.{name}" if path else name
        if is_stack and not _is_stage(child):
            yield inner
        else:
            yield from _blocks(inner, child)


def _is_stack(module: nn.Module) -> bool:
    if not isinstance(module, (nn.ModuleList, nn.Sequential)):
        return False
    children = list(module.children())
    return len({type(child) for child in children}) == 1 and all(any(True for _ in c.children()) for c in children)


def _is_stage(module: nn.Module) -> bool:
    """Whether most of the module is a stack, or stacks, of blocks."""
    stacked = sum(_size(part) for part in (module, *module.children()) if _is_stack(part) and _has_layers(part))
    return 2 * stacked > _size(module)


def _has_layers(stack: nn.Module) -> bool:
    """Whether each of its parts has several weights.

    The convolutions inside a ResNet's block, each with its normalisation, do not make that block a stage.
    """
    return all(sum(parameter.ndim > 1 for parameter in part.parameters()) > 1 for part in stack.children())


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def numbered(model: nn.Module, numbers: Iterable[int], argument: str) -> list[str]:
    """The paths of the blocks with these numbers; negative ones count from the last.

    Raises:
        ValueError: there is no such block; the message calls the numbers ``argument``.
    """
    names = block_names(model)
    wanted = list(numbers)
    for number in wanted:
        if not -len(names) <= number < len(names):
            has = f"{len(names)} blocks, {names[0]} to {names[-1]}" if names else "no repeated blocks"
            raise ValueError(f"{argument} names block {number}, but {type(model).__name__} has {has}")
    return [names[number] for number in wanted]


def is_inside(name: str, paths: Sequence[str]) -> bool:
    """Whether a parameter's name lies below one of the module paths."""
    return any(name.startswith(f"{path}.") for path in paths)


def split_names(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """The block and the type of matrix of every parameter: ``("blocks.3", "attn.qkv.weight")``.

    For selections, which know names but no modules. A block ends at the first number (``3``, ``encoder_layer_3``) that
    is followed by a named module, in this name or in another one of the same list. A later number belongs to the block
    if two named modules follow it: so do the blocks inside Swin's stages, but not experts or the layers of a
    Sequential. Parameters outside blocks get the block ``""``.

    In the type, numbers followed by a named module are written as ``*``, so that all experts are one type; each layer
    of a Sequential is a type of its own.
    """
    names = list(names)
    depths: dict[str, int] = {}  # by list of modules: the most named modules that follow its numbers
    for name in names:
        for path, below in _numbers(name):
            depths[_starred(path)] = max(depths.get(_starred(path), 0), len(below))
    places = {}
    for name in names:
        block: list[str] = []
        for path, _ in _numbers(name):
            if depths[_starred(path)] >= (2 if block else 1):
                block = path
        rest = name.split(".")[len(block) :]
        deep = {len(path) - 1 for path, below in _numbers(name) if below}
        kind = [_star(part) if at in deep else part for at, part in enumerate(rest, start=len(block))]
        places[name] = (".".join(block), ".".join(kind))
    return places


def _numbers(name: str) -> Iterator[tuple[list[str], list[str]]]:
    """Every path in a name that ends with a number, and the named modules below it."""
    modules = name.split(".")[:-1]
    for at, module in enumerate(modules):
        if _NUMBER.fullmatch(module):
            yield modules[: at + 1], [other for other in modules[at + 1 :] if not _NUMBER.fullmatch(other)]


def _starred(path: list[str]) -> str:
    return ".".join(map(_star, path))


def _star(part: str) -> str:
    return re.sub(r"\d+$", "*", part) if _NUMBER.fullmatch(part) else part
