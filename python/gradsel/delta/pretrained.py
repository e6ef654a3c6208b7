"""Models of transformers in folders: plain for every reader, with the delta beside them by which training goes on."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradsel.delta.delta import Delta, load_delta
from gradsel.delta.exporting import is_of_transformers, whole_model
from gradsel.delta.fitting import fitted, in_model
from gradsel.delta.hub import FILE
from gradsel.delta.making import Base
from gradsel.delta.parts import Part, entries_of, read, same_bits, write_
from gradsel.delta.sites import Site, is_base, require_base, require_plain, sites_of
from gradsel.errors import first_line
from gradsel.interrupts import uninterrupted
from gradsel.nn.attaching import attach
from gradsel.parameters.fingerprints import fingerprint
from gradsel.selection.selection import Selection
from gradsel_kernels._warnings import user_stacklevel


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "50GB",
    base: Base | None = None,
    selection: Selection | None = None,
    notes: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Delta:
    """Writes a trained model of transformers as the plain model that it is, and its delta beside it.

    The folder is what ``save_pretrained`` of the plain model writes: config, architecture, names, tied weights and
    shards are its own, so ``from_pretrained`` and servers such as vLLM read it. ``gradsel.delta`` has the values in the
    dtype in which they were trained and the entries that they replace; :func:`from_pretrained` goes on from there. All
    of it is written atomically. Of a sharded model all ranks call it, and the first one writes.

    Args:
        model: attached, or trained in any other way; wrapped or not.
        folder: is created.
        max_shard_size: the largest size of a file of weights, in bytes or as in ``"5GB"``.
        base, selection, notes: for the delta; see :meth:`gradsel.Delta.of`. One of the first two is required if the
            model is not attached.
        **kwargs: for ``save_pretrained`` of transformers.

    Returns:
        The delta.

    Raises:
        TypeError: transformers does not know the model; :func:`gradsel.export` writes any.
        KeyError, ValueError: as from :meth:`gradsel.Delta.of`; or there are adapters of PEFT in the model.
    """
    if not is_of_transformers(model):
        raise TypeError(
            f"{type(model).__name__} is not a model of transformers; gradsel.export(model, folder) writes any model"
        )
    delta = Delta.of(model, base=base, selection=selection, notes=notes)
    with whole_model(model, folder, max_shard_size, **kwargs) as new:
        if new is not None:
            delta.save(new / FILE, originals=True)
    return delta


def from_pretrained(kind: Any, folder: str | os.PathLike[str], **kwargs: Any) -> Any:
    """Reads what :func:`save_pretrained` wrote into an attached model, as if training had not stopped.

    Values, weights and the entries at ``attach()`` are as they were, to the bit. The optimizer is not in the folder.

    Args:
        kind: the class of the model, or one such as ``transformers.AutoModelForCausalLM``.
        folder: or the id of a repository on a model hub with these files.
        **kwargs: for ``kind.from_pretrained``.

    Returns:
        The attached model.

    Raises:
        ValueError: there is no delta, or the model is not the one that it was saved with.
    """
    hub = {key: kwargs[key] for key in ("revision", "token") if key in kwargs}
    delta = Delta.from_pretrained(folder, **hub)
    model: nn.Module = kind.from_pretrained(folder, **kwargs)
    attach_trained(model, delta)
    return model


def save_beside(model: nn.Module, folder: Path) -> None:
    """What a model's own ``save_pretrained`` adds to its folder while it is attached."""
    try:
        Delta.of(model).save(folder / FILE, originals=True, force=True)
    except (KeyError, ValueError) as error:
        warnings.warn(
            f"{folder} holds the plain model, but no {FILE} by which training would go on: {first_line(error)}",
            stacklevel=user_stacklevel(),
        )


def attach_trained(model: nn.Module, delta: Delta) -> None:
    """Attaches a plain model that has a delta in it, as if it had been attached before it was trained.

    Args:
        model: with the values of the delta, rounded to its dtype.
        delta: with originals.

    Raises:
        ValueError: the delta has no originals, or the model does not hold its values on its base; nothing has changed.
    """
    require_plain(model)
    if lost := [name for name, part in delta.items() if part.originals is None]:
        raise ValueError(
            f"the delta does not have the original entries of {len(lost)} tensors, first {lost[0]}; save it with "
            "originals=True, or attach the base and call gradsel.load_delta(model, delta)"
        )

    def attempt(parts: Mapping[str, Part], force: bool) -> list[Site]:
        sites = sites_of(parts, model, force)
        if wrong := [each.name for each in sites if not same_bits(entries_of(each.tensor, each.part), each.values)]:
            raise ValueError(
                f"{len(wrong)} of {len(sites)} tensors of the model do not hold the values of the delta, first "
                f"{wrong[0]}: it is another model, or was changed or cast since it was saved"
            )
        return sites

    sites = fitted(delta, in_model(model), False, attempt)
    with uninterrupted():
        wrong = []
        for site in sites:
            write_(site.tensor, site.part, _originals(site))
            if not _is_on_base(site):
                wrong.append(site.name)
        if wrong:
            for site in sites:
                write_(site.tensor, site.part, site.values)
    require_base(wrong, len(sites))
    attach(model, delta.selection(model))
    load_delta(model, delta)


def _originals(site: Site) -> Tensor:
    assert site.part.originals is not None
    return site.part.originals.reshape(-1).to(site.tensor.device, site.tensor.dtype)


def _is_on_base(site: Site) -> bool:
    with torch.no_grad():
        return is_base(site.name, site.part, read(site.tensor, site.part)[1], lambda: fingerprint(site.tensor))
