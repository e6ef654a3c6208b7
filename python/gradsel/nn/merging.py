"""merge(): the differences of quantised weights become part of the weights, for good."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradsel.attached import attached_root, require_complete
from gradsel.interrupts import uninterrupted
from gradsel.nn.detaching import detach
from gradsel.parameters.names import strip_wrappers
from gradsel.quantised import Quantised, installed, quantised_weight, uninstall
from gradsel.quantised.layers import with_differences
from gradsel.sharding import is_sharded
from gradsel.tables import grouped, shape_text, table


@dataclass(frozen=True)
class Merged:
    """One weight that :func:`merge` has stored anew.

    Attributes:
        shape: of the weight.
        stored_as: a dtype, or the format of the quantised weight.
        entries: the number of its differences.
        size: their root mean square.
        error: that of what is stored, at these entries, from what was asked for.
        worst: the largest error of any entry.
    """

    shape: tuple[int, int]
    stored_as: str
    entries: int
    size: float
    error: float
    worst: float


class MergeReport(dict[str, Merged]):
    """What :func:`merge` stored, and how far it is from the sums, by the names of the weights; printable."""

    @property
    def error(self) -> float:
        """The root mean square error at the entries with differences, over that of the differences; 0 without any."""
        errors, sizes = (
            sum(each.entries * getattr(each, what) ** 2 for each in self.values()) for what in ("error", "size")
        )
        return float((errors / sizes) ** 0.5) if sizes else 0.0

    def __str__(self) -> str:
        groups = grouped((name, (each.shape, each.stored_as)) for name, each in self.items())
        lines = table(("weight", "shape", "stored as"), [(name, shape_text(key[0]), key[1]) for name, key, _ in groups])
        worst = max((each.worst for each in self.values()), default=0.0)
        lines.append(
            f"{sum(each.entries for each in self.values()):,} differences merged; error there {100 * self.error:.3g} % "
            f"of them (root mean squares), at most {worst:.3g} at any entry"
        )
        return "\n".join(lines)


@torch.no_grad()
def merge(model: nn.Module, dtype: torch.dtype | None) -> MergeReport:
    """Adds the differences of quantised weights to the dequantised weights and stores the sums. In place, for good.

    An attached model is detached, as by ``detach(model)``.

    Args:
        model: attached, or with a delta applied.
        dtype: a floating-point dtype: every quantised Linear layer becomes an ``nn.Linear`` of that dtype. None:
            weights with differences are quantised anew with their settings. That loses most of the differences that are
            smaller than the steps of the format, and may change other entries of their blocks.

    Returns:
        What was stored, and its error.

    Raises:
        ValueError: the model has no differences, the dtype is no floating-point dtype, or a format cannot be quantised
            anew; nothing has changed.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point dtype, or None to quantise anew, got {dtype}")
    if sharded := [name for name, parameter in model.named_parameters() if is_sharded(parameter)]:
        raise ValueError(
            f"{sharded[0]} is sharded, and merge() makes whole models: save gradsel.Delta.of(model), which all ranks "
            "call, and merge the quantised base with the delta applied in one process"
        )
    root = attached_root(model)
    if root is not None:
        require_complete(root, "merge()")
    found = [(paths, module, weight) for paths, module, weight in _quantised(model) if dtype or installed(module)]
    if dtype is not None and found and "" in found[0][0]:
        raise ValueError("the model itself is a quantised layer, and merge() replaces layers; pass a module around it")
    if not any(installed(module) for _, module, _ in found):
        raise ValueError("no quantised layer of the model has differences: attach it and train, or apply a delta")
    report, stored = MergeReport(), []
    for paths, module, weight in found:
        new, merged = _stored(module, weight, dtype)
        stored.append((paths, module, weight, new))
        report[strip_wrappers(f"{paths[0]}.weight".lstrip("."))] = merged
    with uninterrupted():
        for _, module, _ in found:
            if (values := module._parameters.get("weight_values")) is not None and installed(module) is not None:
                values.zero_()  # they are in what is stored
        if root is not None:
            detach(root)
        for paths, module, weight, new in stored:
            uninstall(module)
            if dtype is None:
                weight.put(new)
            else:
                _replace(model, paths, module, new)
        if dtype is not None:
            _forget_quantisation(model)
    return report


def _quantised(model: nn.Module) -> list[tuple[list[str], nn.Module, Quantised]]:
    """Each quantised layer, with all its places: a shared one has several."""
    places: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        places.setdefault(module, []).append(path)
    weights = [(paths, module, quantised_weight(module)) for module, paths in places.items()]
    return [(paths, module, weight) for paths, module, weight in weights if weight is not None]


def _stored(module: nn.Module, weight: Quantised, dtype: torch.dtype | None) -> tuple[nn.Parameter, Merged]:
    forward = installed(module)
    values, mask, _ = (None, None, None) if forward is None else forward.trained(weight.device)
    wanted = with_differences(weight, torch.float32, mask, values)
    new = weight.requantised(wanted) if dtype is None else nn.Parameter(wanted.to(dtype), requires_grad=False)
    if mask is None or values is None:
        return new, Merged(weight.shape, _name(weight, dtype), 0, 0.0, 0.0, 0.0)
    error = _dense(weight, new, dtype) - wanted
    return new, Merged(
        weight.shape, _name(weight, dtype), mask.nnz, _rms(values), _rms(mask.gather(error)), float(error.abs().max())
    )


def _dense(weight: Quantised, new: nn.Parameter, dtype: torch.dtype | None) -> Tensor:
    """What a new parameter of the layer holds, in float32."""
    if dtype is not None:
        return new.detach().float()
    return weight.like(new).dense(torch.float32)


def _rms(tensor: Tensor) -> float:
    return float(tensor.float().square().mean().sqrt()) if tensor.numel() else 0.0


def _name(weight: Quantised, dtype: torch.dtype | None) -> str:
    return weight.kind if dtype is None else str(dtype).removeprefix("torch.")


def _replace(model: nn.Module, paths: list[str], module: nn.Module, weight: nn.Parameter) -> None:
    """Puts an ``nn.Linear`` of the weight's dtype in all places of a quantised layer."""
    with torch.device("meta"):
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    made.weight = weight
    bias: Tensor | None = getattr(module, "bias", None)
    if isinstance(bias, nn.Parameter) and bias.dtype is weight.dtype:
        made.bias = bias
    elif bias is not None:  # some libraries keep it as a buffer
        made.bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=bias.requires_grad)
    made.training = module.training
    for path in paths:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, made)


def _forget_quantisation(model: nn.Module) -> None:
    """Takes away what transformers notes about a quantised model, so that it can be saved and loaded as a dense one."""
    for module in model.modules():
        config = getattr(module, "config", None)
        own = vars(module)
        for name in ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
            own.pop(name, None)
        if own.get("is_quantized"):
            own["is_quantized"] = False
        if config is not None and "quantization_config" in getattr(config, "__dict__", {}):
            del config.quantization_config
