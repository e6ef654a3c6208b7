"""Deltas as LoRA adapters of PEFT, by their files; PEFT need not be installed.

A difference in c columns of a matrix is the product B A of rank c in which the rows of A are one-hot and B holds the
differences; for c rows it is the other way round. So a delta is a LoRA, exactly, and whatever serves LoRA serves it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from gradsel.delta.adapter_files import PREFIX, modules_set_whole, originals_of, write_adapter
from gradsel.delta.fitting import by_names_in
from gradsel.delta.making import Base
from gradsel.delta.parts import Part, tensors_of
from gradsel.parameters.names import strip_wrappers, unwrapped
from gradsel.parameters.rules import is_transposed_linear
from gradsel.tables import shape_text
from gradsel.views import NeuronView

#: What to do with layers whose difference has a higher rank than is allowed.
Above = Literal["refuse", "split", "svd"]
_EMBEDDINGS = ("wte", "wpe", "shared")
#: Last names of layers that may be a ``Conv1D`` of transformers.
_INPUTS_FIRST = ("c_attn", "c_proj", "c_fc", "q_attn")


@dataclass
class LoraExport:
    """What :meth:`gradsel.Delta.to_lora` has written; printable.

    Attributes:
        folders: the adapters: one, or with ``above="split"`` those whose sum is the delta.
        rank: ``r`` of the adapters; a server's limit, such as vLLM's ``--max-lora-rank``, must not be below it.
        ranks: the rank that each layer's difference takes exactly, by the name of the layer.
        errors: for layers that ``above="svd"`` has approximated: what is missing, relative to the whole difference, in
            the Frobenius norm.
        saved: modules that are saved whole (PEFT's ``modules_to_save``).
        dropped: what the adapter lacks, by name, and why.
        nbytes: bytes of all tensors.
    """

    folders: list[Path]
    rank: int
    ranks: dict[str, int]
    errors: dict[str, float] = field(default_factory=dict)
    saved: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    nbytes: int = 0

    def __str__(self) -> str:
        lines = [f"{folder}" for folder in self.folders]
        lines.append(f"LoRA of rank {self.rank}, {len(self.ranks)} layers, {self.nbytes:,} bytes")
        if len(self.folders) > 1:
            lines.append(f"{len(self.folders)} adapters, which together are the delta")
        if self.saved:
            lines.append(f"saved whole: {', '.join(self.saved)}")
        if self.errors:
            worst = max(self.errors, key=self.errors.__getitem__)
            lines.append(
                f"{len(self.errors)} layers are approximated; the largest relative error is {self.errors[worst]:.2g}, "
                f"of {worst}"
            )
        lines += [f"left out: {name}, {why}" for name, why in self.dropped.items()]
        return "\n".join(lines)


@dataclass
class _Layer:
    """The difference in one layer, without its empty rows and columns.

    Attributes:
        size: (out, in) of the layer.
        rows, cols: int64, the rows (outputs) and columns (inputs) in which something differs.
        block: float64 [rows, cols].
    """

    size: tuple[int, int]
    rows: Tensor
    cols: Tensor
    block: Tensor

    @property
    def rank(self) -> int:
        return min(self.block.shape)

    def exact(self) -> tuple[Tensor, Tensor]:
        """A [rank, in] and B [out, rank], float64, with B A = the difference."""
        if len(self.cols) <= len(self.rows):
            return self._spread(torch.eye(len(self.cols), dtype=torch.float64), self.block)
        return self._spread(self.block, torch.eye(len(self.rows), dtype=torch.float64))

    def nearest(self, rank: int) -> tuple[Tensor, Tensor, float]:
        """A, B of a rank, with B A as near to the difference as possible, and the relative error."""
        u, s, v = torch.linalg.svd(self.block, full_matrices=False)
        root = s[:rank].sqrt()
        a, b = self._spread(root.unsqueeze(1) * v[:rank], u[:, :rank] * root)
        return a, b, float(s[rank:].norm() / s.norm())

    def _spread(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        rank = a.shape[0]
        whole_a = a.new_zeros(rank, self.size[1]).index_copy_(1, self.cols, a)
        return whole_a, b.new_zeros(self.size[0], rank).index_copy_(0, self.rows, b)


def write_lora(
    parts: Mapping[str, Part],
    folder: Path,
    base: Base | None,
    rank: int | None,
    dtype: torch.dtype | None,
    drop: bool,
    above: Above,
    pad: bool,
) -> LoraExport:
    """See ``Delta.to_lora``."""
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if above not in get_args(Above):
        raise ValueError(f"above must be one of {', '.join(map(repr, get_args(Above)))}, got {above!r}")
    dtype = dtype or torch.float32
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point dtype, got {dtype}")
    model = unwrapped(base) if isinstance(base, nn.Module) else None
    if model is not None:
        parts = by_names_in(model, parts)
    before: Mapping[str, Tensor] = {} if base is None else tensors_of(base)
    structure = None if model is None else _Structure(model)
    refused, linear, saved = _sorted_out(parts, structure)
    if refused and not drop:
        listed = "\n".join(f"  {name}, {why}" for name, why in refused.items())
        raise ValueError(
            f"a LoRA adapter has no place for {len(refused)} of {len(parts)} tensors; drop=True leaves them out:\n"
            f"{listed}"
        )
    if not linear:
        raise ValueError("the delta sets no weight of a Linear layer in part, and LoRA adapts nothing else")
    transposed = {name: _is_transposed(name, part, structure) for name, part in linear.items()}
    layers = {
        name.removesuffix(".weight"): _layer(part, originals_of(name, part, before), transposed[name])
        for name, part in linear.items()
    }
    made = LoraExport([], 0, {path: layer.rank for path, layer in layers.items()}, saved=sorted(saved), dropped=refused)
    pairs = _pairs(layers, rank, above, made)
    whole = {
        PREFIX + name: part.values.to(part.dtype).clone()
        for name, part in parts.items()
        if name not in refused and name not in linear
    }
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(transposed.values()),
        "inference_mode": True,
    }
    known = {name.removesuffix(".weight") for name, t in before.items() if name.endswith(".weight") and t.ndim == 2}
    highest = max(a.shape[0] for a, _ in pairs.values())
    step = highest if rank is None else rank
    folders = [folder] if highest <= step else [folder / f"part-{n + 1}" for n in range(-(-highest // step))]
    adapters = []
    for number in range(len(folders)):
        own = _slices(pairs, number * step, step)
        top = max(a.shape[0] for a, _ in own.values())
        ranks = {} if pad else {path: a.shape[0] for path, (a, _) in own.items() if a.shape[0] != top}
        settings = {
            "r": top,
            "lora_alpha": top,
            "target_modules": _targets(own, known),
            "rank_pattern": ranks,
            "alpha_pattern": ranks,  # as r = lora_alpha everywhere, nothing is scaled
            "modules_to_save": (sorted(saved) or None) if number == 0 else None,
        }
        tensors = _tensors(own, dtype, top if pad else None) | (whole if number == 0 else {})
        adapters.append((tensors, config | settings))
        made.rank = max(made.rank, top)
        made.nbytes += sum(tensor.nbytes for tensor in tensors.values())
    for target, (tensors, settings) in zip(folders, adapters, strict=True):
        write_adapter(target, tensors, settings)
        made.folders.append(target)
    return made


def _sorted_out(
    parts: Mapping[str, Part], structure: _Structure | None
) -> tuple[dict[str, str], dict[str, Part], set[str]]:
    """Why some tensors have no place in an adapter; the weights that it adapts; and the modules that it saves whole."""
    refused = {name: why for name, part in parts.items() if (why := _refusal(name, part, structure))}
    linear = {name: part for name, part in parts.items() if name not in refused and not part.mask.is_whole}
    saved = modules_set_whole(parts, linear) - {name.removesuffix(".weight") for name in refused}
    for name, part in parts.items():
        if part.mask.is_whole and name.rpartition(".")[0] not in saved:
            refused.setdefault(name, "which is set whole, but not the weight of its module")
    return refused, linear, saved


def _pairs(
    layers: Mapping[str, _Layer], rank: int | None, above: Above, made: LoraExport
) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each layer, of a higher rank than allowed if they will be split."""
    too_high = [path for path, layer in layers.items() if rank is not None and layer.rank > rank]
    if too_high and above == "refuse":
        worst = max(too_high, key=made.ranks.__getitem__)
        raise ValueError(
            f"{len(too_high)} of {len(layers)} layers need a rank above rank={rank}, the most {worst} with "
            f"{made.ranks[worst]}; pass a higher rank, above='svd' for the nearest adapter of that rank, or "
            "above='split' for several adapters whose sum is exact"
        )
    pairs = {}
    for path, layer in layers.items():
        if rank is not None and layer.rank > rank and above == "svd":
            a, b, made.errors[path] = layer.nearest(rank)
            pairs[path] = a, b
        else:
            pairs[path] = layer.exact()
    return pairs


def _slices(pairs: Mapping[str, tuple[Tensor, Tensor]], start: int, step: int) -> dict[str, tuple[Tensor, Tensor]]:
    own = slice(start, start + step)
    return {path: (a[own], b[:, own]) for path, (a, b) in pairs.items() if a.shape[0] > start}


def _tensors(pairs: Mapping[str, tuple[Tensor, Tensor]], dtype: torch.dtype, rank: int | None) -> dict[str, Tensor]:
    found = {}
    for path, (a, b) in pairs.items():
        missing = 0 if rank is None else rank - a.shape[0]
        padded = torch.cat([a, a.new_zeros(missing, a.shape[1])]), torch.cat([b, b.new_zeros(b.shape[0], missing)], 1)
        for letter, tensor in zip("AB", padded, strict=True):
            found[f"{PREFIX}{path}.lora_{letter}.weight"] = tensor.to(dtype).contiguous()
            if not bool(found[f"{PREFIX}{path}.lora_{letter}.weight"].isfinite().all()):
                raise ValueError(f"{path}: differences are not finite in {dtype}; pass another dtype=")
    return found


def _targets(paths: Iterable[str], known: set[str]) -> list[str]:
    """The last names of the adapted layers, such as q_proj, where they mean no others; otherwise whole names."""
    adapted = set(paths)
    short = {path: path.rpartition(".")[2] for path in adapted}
    strangers = {path.rpartition(".")[2] for path in known - adapted}
    return sorted({path if not known or last in strangers else last for path, last in short.items()})


def _layer(part: Part, originals: Tensor, transposed: bool) -> _Layer:
    """The difference as stored: values are rounded to the tensor's dtype, as applying the delta rounds them."""
    shape = part.mask.shape
    entries = part.mask.ordered_entries()
    row, col = entries // shape[1], entries % shape[1]
    values = part.values if part.differences else part.values.to(part.dtype)
    moved = (values.double() - originals.double()).reshape(-1)
    if transposed:
        row, col, shape = col, row, (shape[1], shape[0])
    differs = moved != 0
    if not bool(differs.any()):
        differs[:1] = True  # a layer must have some rank
    rows, r = row[differs].unique(return_inverse=True)
    cols, c = col[differs].unique(return_inverse=True)
    block = torch.zeros(len(rows), len(cols), dtype=torch.float64)
    block[r, c] = moved[differs]
    return _Layer((shape[0], shape[1]), rows, cols, block)


class _Structure:
    """What a model tells about its tensors that their shapes do not."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = {strip_wrappers(path): module for path, module in model.named_modules(remove_duplicate=False)}
        self._names: dict[int, list[str]] = {}
        self._tensors = tensors_of(model)
        for name, tensor in self._tensors.items():
            self._names.setdefault(id(tensor), []).append(name)

    def tied(self, name: str) -> list[str]:
        """The other names of a tensor."""
        return [other for other in self._names.get(id(self._tensors.get(name)), []) if other != name]


def _refusal(name: str, part: Part, model: _Structure | None) -> str | None:
    """Why an adapter has no place for a tensor; None if it may have one."""
    path, _, short = name.rpartition(".")
    if short == "bias":
        return None if part.mask.is_whole else "a bias that is set in part"
    if short != "weight" or len(part.mask.shape) > 2:
        return f"{shape_text(part.mask.shape)}, which is no weight of a Linear layer"
    if len(part.mask.shape) < 2:
        return "a norm or another vector"
    if part.mask.is_whole:
        return None
    if model is None:
        return "an embedding" if _sounds_like_embedding(path) else None
    module = model.modules.get(path)
    if isinstance(module, nn.Embedding):
        return "an embedding"
    if not (isinstance(module, nn.Linear) or (module is not None and is_transposed_linear(module))):
        return f"of a {type(module).__name__}, not of a Linear layer"
    if others := model.tied(name):
        return f"which is also {others[0]}: an adapter of one would not change the other"
    return None


def _sounds_like_embedding(path: str) -> bool:
    last = path.rpartition(".")[2]
    return "embed" in last or last in _EMBEDDINGS


def _is_transposed(name: str, part: Part, model: _Structure | None) -> bool:
    """Whether the weight is stored as [in, out].

    Raises:
        ValueError: it may be, and only the model could tell.
    """
    path = name.removesuffix(".weight")
    if model is not None:
        return is_transposed_linear(model.modules[path])
    view = getattr(part.mask, "view", None)
    if path.rpartition(".")[2] in _INPUTS_FIRST or (isinstance(view, NeuronView) and view.row_dims == (1,)):
        raise ValueError(
            f"{name} may be stored as [in, out], as in GPT-2, or as [out, in]; pass base= as a model, which tells"
        )
    return False
