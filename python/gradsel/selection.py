"""Selection: one pass over the data, and from its gradients a mask for every parameter."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

import gradsel_kernels as gk
from gradsel.masks import Flat, Frozen, Mask, PerRow, Whole, WholeColumns, WholeRows, from_parts
from gradsel.rules import HEAD, Rule, parameter_rules, strip_wrappers
from gradsel.tables import grouped, shape_text, table

_FORMAT = "gradsel.selection"
_FORMAT_VERSION = 1

#: Scores of one weight from its neuron view and the neuron view of its accumulated gradient, both [rows, cols]. The
#: largest magnitudes are selected.
Score = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Criterion:
    """What makes an entry worth training. A plain function ``(weight, grad) -> score`` is one, too.

    Attributes:
        name: what the selection's notes call it.
        score: the scores [rows, cols] of one weight, from its neuron view and that of its summed gradient.
        needs_gradient: whether gradients are computed at all.
        each_batch: what is summed over batches, from the gradient of one, which it may change in place. None: the
            gradient itself, with its sign.
        squared: scores are squares already; rows and columns are then judged by plain sums of them.
        reset: called before a selection, so that each one starts alike.
    """

    name: str
    score: Callable[[Tensor, Tensor | None], Tensor]
    needs_gradient: bool = True
    each_batch: Callable[[Tensor], Tensor] | None = None
    squared: bool = False
    reset: Callable[[], object] = lambda: None


def random_scores(seed: int = 0) -> Criterion:
    """Random entries, the baseline of GPS Tab. 6; the same for the same seed."""
    generator = torch.Generator()

    def score(weight: Tensor, grad: Tensor | None) -> Tensor:
        return torch.rand(weight.shape, generator=generator).to(weight.device)

    return Criterion(f"random, seed {seed}", score, needs_gradient=False, reset=lambda: generator.manual_seed(seed))


_CRITERIA: dict[str, Callable[[], Criterion]] = {
    "gradient": lambda: Criterion("gradient", lambda weight, grad: _given(grad)),
    "absolute": lambda: Criterion("absolute", lambda weight, grad: _given(grad), each_batch=torch.abs_),
    "fisher": lambda: Criterion("fisher", lambda weight, grad: _given(grad), each_batch=torch.square_, squared=True),
    "snip": lambda: Criterion("snip", lambda weight, grad: weight * _given(grad)),
    "magnitude": lambda: Criterion("magnitude", lambda weight, grad: weight, needs_gradient=False),
    "random": random_scores,
}


def _given(grad: Tensor | None) -> Tensor:
    assert grad is not None  # select() ranks only what has a gradient
    return grad


@dataclass(frozen=True)
class _Counted:
    k: int = 1

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"{type(self).__name__}(k) needs k >= 1, got {self.k}")


@dataclass(frozen=True)
class PerNeuron(_Counted):
    """The ``k`` best entries of every neuron (row): GPS, equation 3.

    Args:
        k: entries a neuron; a neuron with fewer inputs is kept whole.
    """

    def choose(self, score: Tensor, shape: tuple[int, ...], rule: Rule, squared: bool) -> Mask:
        """The mask of one parameter from its scores [rows, cols]."""
        return PerRow(gk.topk_rows(score, self.k), shape, rule.view)


@dataclass(frozen=True)
class Rows(_Counted):
    """The ``k`` best neurons of every matrix, with all their inputs: GRFT, equations 4 to 6.

    A neuron's score is the sum of its squared scores (of the scores, where they are squares: ``"fisher"``).

    Args:
        k: neurons a matrix; a matrix with fewer is kept whole.
    """

    def choose(self, score: Tensor, shape: tuple[int, ...], rule: Rule, squared: bool) -> Mask:
        """The mask of one parameter from its scores [rows, cols], which are ``squared`` already or not."""
        return WholeRows(_best(score if squared else score.square(), 1, self.k), shape, rule.view)


@dataclass(frozen=True)
class Columns(_Counted):
    """The ``k`` best inputs of every matrix, for all neurons: GRFT with columns.

    An input's score is the sum of its squared scores (of the scores, where they are squares: ``"fisher"``).

    Args:
        k: inputs a matrix; a matrix with fewer is kept whole.
    """

    def choose(self, score: Tensor, shape: tuple[int, ...], rule: Rule, squared: bool) -> Mask:
        """The mask of one parameter from its scores [rows, cols], which are ``squared`` already or not."""
        return WholeColumns(_best(score if squared else score.square(), 0, self.k), shape, rule.view)


def _best(score: Tensor, dim: int, k: int) -> Tensor:
    """The rows or columns with the largest sum along ``dim``: int32 [k], ascending, ties to the lowest."""
    return gk.topk_rows(score.sum(dim).unsqueeze(0), k)[0]


Policy = PerNeuron | Rows | Columns


class Selection(Mapping[str, Mask]):
    """A mask for every parameter of a model, by name; frozen ones included.

    Attributes:
        notes: how it was made: policy, criterion, number of batches, rows whose gradient was zero.
    """

    def __init__(self, masks: Mapping[str, Mask], notes: Mapping[str, Any] | None = None) -> None:
        self._masks = dict(masks)
        self.notes = dict(notes or {})

    @staticmethod
    def from_dense(masks: Mapping[str, Tensor]) -> Selection:
        """From boolean masks shaped like their parameters, such as published code saves."""
        return Selection({name: Flat.from_dense(mask) for name, mask in masks.items()}, {"policy": "imported"})

    def __getitem__(self, name: str) -> Mask:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def trainable_count(self) -> int:
        """Trained scalars in all: selected entries, biases, head."""
        return sum(mask.nnz for mask in self.values())

    def summary(self) -> str:
        """A table with one line for each group of equal parameters; block numbers are written as ``*``."""
        groups = grouped((name, (mask.shape, mask.how, mask.nnz)) for name, mask in self.items())
        rows = [
            (
                name,
                shape_text(shape),
                "-" if nnz == 0 else how,
                f"{nnz * count:,}" if nnz else f"frozen: {how}",
            )
            for name, (shape, how, nnz), count in groups
        ]
        lines = table(("parameter", "shape", "mask", "trained"), rows)
        total = sum(math.prod(mask.shape) for mask in self.values())
        share = 100 * self.trainable_count() / max(total, 1)
        lines.append(f"{self.trainable_count():,} of {total:,} parameters trained ({share:.2f} %)")
        how = ", ".join(f"{key} {value}" for key, value in self.notes.items())
        return "\n".join(lines + ([how] if how else []))

    def __repr__(self) -> str:
        return f"Selection({self.trainable_count():,} trained of {len(self)} parameters)"

    def __str__(self) -> str:
        return self.summary()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file, atomically: the tensors of the masks, and the rest as JSON metadata."""
        tensors = {}
        parameters = {}
        for name, mask in self.items():
            parameters[name] = {"kind": mask.kind, "shape": list(mask.shape), **mask.describe()}
            for part, tensor in mask.tensors().items():
                tensors[f"{name}:{part}"] = tensor.cpu().clone()  # two names may share one mask
        metadata = {
            "format": _FORMAT,
            "version": str(_FORMAT_VERSION),
            "parameters": json.dumps(parameters),
            "notes": json.dumps(self.notes),
        }
        path = Path(path)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            save_file(tensors, unfinished, metadata)
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Selection:
        """Reads what :meth:`save` wrote.

        Raises:
            ValueError: the file is not a selection, is damaged, or was written by a later version.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}") from None
        if metadata.get("format") != _FORMAT:
            raise ValueError(
                f"{path} is not a selection: its format is {metadata.get('format')!r}, expected {_FORMAT!r}"
            )
        if metadata.get("version") != str(_FORMAT_VERSION):
            raise ValueError(
                f"{path} is of version {metadata.get('version')}; this library reads {_FORMAT_VERSION}, update it"
            )
        try:
            masks = {}
            for name, described in json.loads(metadata["parameters"]).items():
                parts = {key[len(name) + 1 :]: t for key, t in tensors.items() if key.rpartition(":")[0] == name}
                masks[name] = from_parts(described["kind"], described["shape"], described, parts)
            return Selection(masks, json.loads(metadata["notes"]))
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is damaged: {error!r}") from None


def select(
    model: nn.Module,
    batches: Iterable[Any] | None,
    loss: Callable[[Any, Any], Tensor] | None,
    policy: Policy = PerNeuron(1),
    criterion: str | Criterion | Score = "gradient",
    *,
    head: Iterable[str] = HEAD,
    rank: Iterable[str] = (),
    whole: Iterable[str] = (),
    freeze: Iterable[str] = (),
    progress: bool | None = None,
) -> Selection:
    """Chooses the entries to train, from the gradients of one pass over ``batches``.

    By default the gradient of every ranked parameter is summed over all batches with its sign, and the magnitude is
    taken once, at the end (GPS, section 3.2). Ties go to the lowest column.

    Args:
        model: run as it is: mode, autocast and device are the caller's. Gradients, ``requires_grad`` flags, buffers
            and torch's random number generators (CPU and CUDA) are given back as they were. Parameters are known by
            their names without the prefixes of DistributedDataParallel and torch.compile.
        batches: anything to iterate over, once. None for a criterion that needs no gradient.
        loss: ``loss(model, batch)`` returns the scalar to differentiate, for example supervised contrastive loss on
            features: ``lambda model, batch: SupConLoss()(model.forward_features(batch[0]), batch[1])``.
        policy: how many entries of what: ``PerNeuron(3)``, ``Rows(3)`` or ``Columns(3)``.
        criterion: what is ranked by its magnitude: ``"gradient"``, the sum over batches; ``"absolute"``, the sum of
            magnitudes; ``"fisher"``, the sum of squares (the empirical Fisher information, batch by batch); ``"snip"``,
            weight times gradient (Lee et al. 2019); ``"magnitude"``, the weight; ``"random"``; or a function of the
            neuron views ``(weight, grad) -> score``.
        head, rank, whole, freeze: what is ranked, trained whole or frozen: see :func:`gradsel.rules.parameter_rules`.
        progress: show a progress bar; None: on a terminal only.

    Returns:
        A mask for every parameter.

    Raises:
        ValueError: no batches; a gradient that is not finite (the parameter is named); a parameter named in ``rank``
            that gets no gradient; a pattern that matches nothing.
    """
    chosen = _criterion(criterion)
    rules = parameter_rules(model, head=head, rank=rank, whole=whole, freeze=freeze)
    parameters = {strip_wrappers(name): parameter for name, parameter in model.named_parameters()}
    chosen.reset()
    ranked = {name: parameters[name] for name, rule in rules.items() if rule.action == "rank"}
    grads: dict[str, Tensor] = {}
    count = 0
    if chosen.needs_gradient and ranked:
        if batches is None or loss is None:
            raise ValueError(f"criterion {chosen.name!r} needs gradients: pass batches and loss")
        with _kept(model):
            grads, count = _accumulate(model, ranked, batches, loss, chosen.each_batch, progress)

    masks: dict[str, Mask] = {}
    zero_rows: dict[str, int] = {}
    for name in tqdm(rules, desc="ranking", unit="tensor", disable=_quiet(progress), leave=False):
        rule, parameter = rules[name], parameters[name]
        shape = tuple(parameter.shape)
        if rule.action == "whole":
            masks[name] = Whole(shape)
        elif rule.action == "freeze":
            masks[name] = Frozen(shape, rule.reason)
        elif chosen.needs_gradient and name not in grads:
            if rule.named:
                raise ValueError(f"{name} was named to be ranked, but got no gradient: the loss does not depend on it")
            masks[name] = Frozen(shape, "no gradient")
        else:
            grad = grads.pop(name, None)  # freed as soon as it has been ranked
            grad = None if grad is None else rule.view.of(grad)
            with torch.no_grad():
                score = chosen.score(rule.view.of(parameter.detach()), grad)
            masks[name] = policy.choose(score, shape, rule, chosen.squared)
            if empty := int((score == 0).all(dim=1).sum()) if score.numel() else 0:
                zero_rows[name] = empty
    notes: dict[str, Any] = {"policy": str(policy), "criterion": chosen.name}
    if chosen.needs_gradient:
        notes["batches"] = count
    if zero_rows:
        notes["neurons that score zero"] = sum(zero_rows.values())
        worst = max(zero_rows, key=lambda name: zero_rows[name])
        hint = " Under fp16 autocast, scale the loss." if chosen.needs_gradient else ""
        warnings.warn(
            f"{sum(zero_rows.values())} neurons score zero everywhere (most in {worst}: {zero_rows[worst]}); "
            f"their first inputs were selected.{hint}",
            stacklevel=2,
        )
    return Selection(masks, notes)


def freeze(model: nn.Module, selection: Selection) -> None:
    """Sets ``requires_grad`` as a selection says: True where anything is selected, False elsewhere.

    For training with dense gradients; backward then skips the gradients of frozen parameters.

    Raises:
        KeyError: a parameter the selection does not know; no flag has changed.
    """
    parameters = dict(model.named_parameters())
    masks = {name: lookup(selection, name) for name in parameters}
    for name, parameter in parameters.items():
        parameter.requires_grad_(masks[name].nnz > 0)


def lookup(selection: Mapping[str, Mask], name: str) -> Mask:
    """The mask of a parameter whose name may carry the prefixes of DistributedDataParallel or torch.compile."""
    for candidate in (name, strip_wrappers(name)):
        if candidate in selection:
            return selection[candidate]
    raise KeyError(
        f"the selection has no parameter {name!r}; it was made for another model (it knows {len(selection)}, "
        f"the first is {next(iter(selection), 'none')!r})"
    )


def _criterion(criterion: str | Criterion | Score) -> Criterion:
    if isinstance(criterion, Criterion):
        return criterion
    if callable(criterion):
        function = criterion
        name = getattr(function, "__name__", type(function).__name__)
        return Criterion(name, lambda weight, grad: function(weight, _given(grad)))
    if criterion not in _CRITERIA:
        raise ValueError(f"unknown criterion {criterion!r}; choose one of {', '.join(_CRITERIA)}, or pass a function")
    return _CRITERIA[criterion]()


def _accumulate(
    model: nn.Module,
    ranked: Mapping[str, nn.Parameter],
    batches: Iterable[Any],
    loss: Callable[[Any, Any], Tensor],
    each_batch: Callable[[Tensor], Tensor] | None,
    progress: bool | None,
) -> tuple[dict[str, Tensor], int]:
    """Sums over batches in at least float32, for the parameters that got any gradient; and the number of batches."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    for parameter in ranked.values():
        parameter.requires_grad_(True)
    sums: dict[str, Tensor] = {}
    count = 0
    for batch in tqdm(batches, desc="selection gradients", unit="batch", disable=_quiet(progress), leave=False):
        count += 1
        value = loss(model, batch)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            raise ValueError(
                f"loss(model, batch) must return a scalar that depends on the ranked parameters, got {_describe(value)}"
            )
        if not bool(value.isfinite()):
            raise ValueError(f"the selection loss of batch {count} is {value.item()}, so its gradients mean nothing")
        value.backward()
        for name, parameter in ranked.items():
            if parameter.grad is None:
                continue
            if each_batch is None and parameter.dtype in (torch.float32, torch.float64):
                sums[name] = parameter.grad  # autograd goes on adding to it
                continue
            grad = parameter.grad if parameter.dtype is torch.float64 else parameter.grad.float()
            parameter.grad = None
            grad = grad if each_batch is None else each_batch(grad)
            sums[name] = sums[name].add_(grad) if name in sums else grad
    if count == 0:
        raise ValueError("batches is empty: there is nothing to take gradients of")
    for name, total in sums.items():  # what was once not finite stays so in the sum
        if not bool(total.isfinite().all()):
            bad = int((~total.isfinite()).sum())
            raise ValueError(
                f"the gradient of {name} is not finite ({bad} of {total.numel()} entries); "
                "look for an overflow in half precision or a division by zero in the loss"
            )
    return sums, count


@contextmanager
def _kept(model: nn.Module) -> Iterator[None]:
    """Gives flags, gradients, modes, buffers and random number generators back as they were."""
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = {p.device for p, _, _ in parameters if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=[device.index for device in devices if device.index is not None]):
        try:
            with torch.enable_grad():
                yield
        finally:
            for parameter, requires_grad, grad in parameters:
                parameter.grad = grad
                parameter.requires_grad_(requires_grad)
            for module, training in modes:
                module.training = training
            with torch.no_grad():
                for module, name, buffer, original in buffers:
                    module._buffers[name] = buffer  # forward may have put another tensor in its place
                    if not torch.equal(buffer, original):
                        buffer.copy_(original)


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}" + ("" if value.requires_grad else " without a gradient")
    return type(value).__name__


def _quiet(progress: bool | None) -> bool | None:
    return None if progress is None else not progress  # tqdm's None: only on a terminal
