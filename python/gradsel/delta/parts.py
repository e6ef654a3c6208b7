"""The parts of a delta, each for one tensor, and how they recognise the tensor they were made on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from gradsel.masks import Flat, Mask
from gradsel.masks.encoding import ascends
from gradsel.parameters.fingerprints import INTEGERS
from gradsel.parameters.names import strip_wrappers
from gradsel.sharding import entries_of as entries_of_shards
from gradsel.sharding import is_sharded
from gradsel.views import memory_of

#: Number of entries of a tensor that are checked before a part is applied, besides those that it replaces.
PROBES = 32


@dataclass(frozen=True, eq=False)
class Part:
    """What a delta does to one tensor.

    Attributes:
        mask: the entries that it sets.
        values: their new values, of ``mask.compact_shape``, in the dtype that they were trained or saved in.
        dtype: dtype of the base, the tensor that the part was made on.
        digest: digest of the replaced entries of the base and of a few others, see :func:`read`; "" if not known.
        fingerprint: fingerprint of the base from :mod:`gradsel.parameters.fingerprints`; "" if not known.
        originals: the replaced entries of the base, shaped like ``values`` but in its dtype, if they are kept.
        differences: the format of a quantised base, such as ``nf4``: then ``values`` are differences from its
            dequantised entries, and ``dtype`` is that in which it is dequantised; "" if they are values.
    """

    mask: Mask
    values: Tensor
    dtype: torch.dtype
    digest: str = ""
    fingerprint: str = ""
    originals: Tensor | None = None
    differences: str = ""
    _places: dict = field(default_factory=dict, repr=False)

    def places(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """Offsets in the memory of a tensor, computed once for its strides and device.

        Returns:
            int64 [nnz], the entries in mask order, and int64 [nnz + p], the same followed by p <= 32 probes.
        """
        key = (tensor.stride(), tensor.device)
        if key not in self._places:
            offsets = self.mask.to(tensor.device).offsets(tensor)
            self._places[key] = offsets, torch.cat([offsets, _probes(tensor, offsets)])
        return self._places[key]

    def remade(self, mask: Mask, values: Tensor) -> Part:
        """A part for the same tensor that sets other entries, whose original values are not known."""
        return replace(self, mask=mask, values=values, digest="", originals=None, _places={})


def read(tensor: Tensor, part: Part) -> tuple[Tensor, str]:
    """The entries of a dense tensor that a part replaces, flat in mask order, and their digest.

    The digest is BLAKE2b, 16 bytes as hex, of these entries and of the probes: entries number ``i * numel // n`` in
    row-major order, with ``n = min(numel, 32)`` and i from 0, without those that the part replaces.
    """
    both = entries_of(tensor, part) if part.mask.is_whole else memory_of(tensor).index_select(0, part.places(tensor)[1])
    return both[: part.mask.nnz], _hash(both)


def entries_of(tensor: Tensor, part: Part) -> Tensor:
    """A copy of the entries of a dense tensor that a part replaces, flat in mask order."""
    if part.mask.is_whole:
        return tensor.detach().clone(memory_format=torch.contiguous_format).view(-1)
    return memory_of(tensor).index_select(0, part.places(tensor)[0])


def digest_with(originals: Tensor, tensor: Tensor, part: Part) -> str:
    """The digest that a tensor had when the entries that a part replaces were ``originals``.

    All ranks of a DTensor call it.
    """
    if part.mask.is_whole:
        return _hash(originals.reshape(-1))
    if is_sharded(tensor):
        probed = Flat(_probes(tensor, part.mask.ordered_entries()).sort().values, tensor.shape)
        probes = entries_of_shards(probed.to(tensor.device), tensor)
        return _hash(torch.cat([originals.reshape(-1).cpu(), probes.cpu()]))
    probes = part.places(tensor)[1][part.mask.nnz :]
    return _hash(torch.cat([originals.reshape(-1), memory_of(tensor)[probes]]))


def write_(tensor: Tensor, part: Part, entries: Tensor) -> None:
    """Writes the entries of a part, given flat in mask order with the dtype and device of ``tensor``."""
    if part.mask.is_whole:
        tensor.detach().copy_(entries.view(tensor.shape))
    else:
        memory_of(tensor).index_copy_(0, part.places(tensor)[0], entries)


def tensors_of(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters and buffers of a model, or the tensors of a state_dict, by name without the prefixes of wrappers.

    Tied tensors appear under each of their names.
    """
    if not isinstance(model, nn.Module):
        return {strip_wrappers(name): tensor for name, tensor in model.items() if isinstance(tensor, Tensor)}
    named = [*model.named_buffers(remove_duplicate=False), *model.named_parameters(remove_duplicate=False)]
    return {strip_wrappers(name): tensor for name, tensor in named}


def bits_of(tensor: Tensor) -> Tensor:
    """The bits of a tensor as integers of the same size; an alias."""
    return tensor.detach().view(INTEGERS[tensor.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bits: NaN equals NaN, and 0 differs from -0."""
    return a.shape == b.shape and a.dtype is b.dtype and torch.equal(bits_of(a), bits_of(b))


def ascending(mask: Mask) -> tuple[Tensor, Tensor]:
    """Row-major indices of a mask's entries in the tensor, ascending, and the position of each in mask order.

    Both are int64 [nnz].
    """
    if mask.is_whole:
        return mask.entries(), mask.entries()
    entries, order = mask.ordered_entries().sort()
    return entries, order


def _probes(tensor: Tensor, offsets: Tensor) -> Tensor:
    count = min(tensor.numel(), PROBES)
    entries = torch.arange(count, device=tensor.device) * tensor.numel() // max(count, 1)
    if not tensor.is_contiguous():
        coordinates = torch.unravel_index(entries, tensor.shape)
        steps = [numbers * stride for numbers, stride in zip(coordinates, tensor.stride(), strict=True)]
        entries = torch.stack(steps).sum(0)
    known = offsets if ascends(offsets) else offsets.sort().values
    return entries[known[torch.searchsorted(known, entries).clamp_(max=known.numel() - 1)] != entries]


def _hash(entries: Tensor) -> str:
    raw = entries.detach().cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.blake2b(raw.data, digest_size=16).hexdigest()
