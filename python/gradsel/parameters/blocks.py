"""The blocks of a model: its repeated parts, in order, as GPS's block study and GRFT's regular layers number them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import nn


def block_names(model: nn.Module) -> list[str]:
    """The paths of all blocks in the order of the model, for example ``blocks.0`` to ``blocks.11``.

    Blocks are the modules of one class that a ``ModuleList`` or ``Sequential`` stacks, the outermost ones, except that
    the stages of a hierarchical network (Swin, ConvNeXt, ResNet) are looked into: each of their blocks counts.
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
    """Whether it is a stack of its own, or most of it is."""
    stacked = sum(_size(part) for part in (module, *module.children()) if _is_stack(part) and _has_layers(part))
    return 2 * stacked > _size(module)


def _has_layers(stack: nn.Module) -> bool:
    """Whether each of its parts has several weights: the convolutions inside a ResNet's block, each with its
    normalisation, do not make that block a stage."""
    return all(sum(parameter.ndim > 1 for parameter in part.parameters()) > 1 for part in stack.children())


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def numbered(model: nn.Module, numbers: Iterable[int], argument: str) -> list[str]:
    """The paths of the blocks with these numbers; negative ones count from the last.

    Raises:
        ValueError: there is no such block; the message names ``argument``.
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
