"""select(): turns the gradients of a model on data into a mask for every parameter."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm.auto import tqdm
from typing_extensions import Unpack

import gradsel_kernels as gk
from gradsel.masks import Frozen, Mask, PerRow, Whole
from gradsel.parameters.claimed import require_unpartitioned
from gradsel.parameters.fingerprints import fingerprints
from gradsel.parameters.names import parameter_uses, shaped_parameters
from gradsel.parameters.rules import Rule, RuleOptions, parameter_rules, sizes_of
from gradsel.quantised import Ranked, StandIn, install, installed, uninstall
from gradsel.ranking.criteria import Criterion, Score, criterion_of
from gradsel.ranking.distributed import process_group_of
from gradsel.ranking.gradients import Loss, collect
from gradsel.ranking.planning import make_plan
from gradsel.ranking.policies import Columns, PerNeuron, Policy
from gradsel.ranking.preserving import preserved
from gradsel.ranking.scores import Ranking, Scores
from gradsel.ranking.shards import best_of_rows, gathered, is_by_matrix
from gradsel.selection.selection import Selection
from gradsel.sharding import is_sharded, local_of, reshard, sum_over_shards, whole_of
from gradsel_kernels._warnings import user_stacklevel


@torch.inference_mode(False)  # no gradients are formed in it
def select(
    model: nn.Module,
    batches: Iterable[Any] | None,
    loss: Loss | None,
    policy: Policy = PerNeuron(1),
    criterion: str | Criterion | Score = "gradient",
    *,
    memory: str = "auto",
    max_gradient_bytes: int | None = None,
    offload: bool = False,
    loss_scale: float = 1.0,
    process_group: dist.ProcessGroup | None = None,
    progress: bool | None = None,
    **rules: Unpack[RuleOptions],
) -> Selection:
    """Chooses the entries to train, from the gradients of one pass over ``batches``.

    By default, the gradient of every ranked parameter is summed over all batches with its sign, and its magnitude is
    taken once, at the end (GPS, section 3.2). Ties go to the lowest column. Every ``memory`` mode gives the same masks.

    Args:
        model: run in the caller's mode, autocast, activation checkpointing and device. Gradients, ``requires_grad``
            flags, buffers and the global random number generators are restored afterwards. Names of parameters lack the
            prefixes of DistributedDataParallel and torch.compile. Whether parameters require gradients now does not
            matter; leave some out with ``freeze=``.
        batches: any iterable. None for a criterion that needs no gradient.
        loss: ``loss(model, batch)`` returns the scalar to differentiate, for example ``gradsel.contrastive()`` or
            ``gradsel.cross_entropy``.
        policy: how many entries are trained, and which compete: ``PerNeuron(k)``, ``PerLayer(fraction)``,
            ``Global(fraction)``, ``Rows(k)`` or ``Columns(k)``.
        criterion: what is ranked by magnitude: ``"gradient"``, its sum over batches; ``"absolute"``, the sum of its
            magnitudes; ``"fisher"``, the sum of its squares (the empirical Fisher information, batch by batch);
            ``"relative"``, the sum over the root mean square of the sums of its input; ``"snip"``, weight times
            gradient (Lee et al. 2019); ``"magnitude"``, the weight; ``"random"``; or a function
            ``(weight, grad) -> score`` of the neuron views, which receives copies.
        memory: how gradients are held while they are summed. ``"full"``: all of them, 4 bytes for each ranked entry.
            ``"streaming"``, for a single batch: each is ranked and freed as soon as backward has computed it.
            ``"grouped"``: within ``max_gradient_bytes``, in several passes over the data; every pass must see the same
            batches, and random numbers are replayed. ``"auto"`` decides by the free memory; the selection's notes say
            what it chose.
        max_gradient_bytes: most bytes of gradients and their sums to hold at a time; implies ``"grouped"``.
        offload: keep the sums on the CPU.
        loss_scale: multiplies the loss, and divides the gradients in float32, to avoid underflow in float16.
        process_group: ranks that each see part of the data and select jointly: gradients are added over all ranks
            before ranking, so that all get the same masks. None: that of a DistributedDataParallel or sharded model, if
            any. FSDP averages the gradients of all ranks in each backward, so there a batch is that of all ranks.
        progress: whether to show a progress bar; None: only on a terminal.
        **rules: ``head``, ``kinds``, ``blocks``, ``skip_blocks``, ``rank``, ``whole``, ``freeze``: what is ranked,
            trained whole or frozen; see :func:`gradsel.parameters.rules.parameter_rules`.

    Returns:
        A mask for every parameter.

    Raises:
        ValueError: there are no batches; a gradient is not finite (the message names the parameter); a parameter named
            in ``rank`` gets no gradient; a pattern matches nothing; nothing is selected; or the passes differ.
    """
    chosen = criterion_of(criterion)
    if not isinstance(policy, Policy):
        raise TypeError(f"policy must be a policy such as PerNeuron(1), got {policy!r}")
    if not (math.isfinite(loss_scale) and loss_scale > 0):
        raise ValueError(f"loss_scale must be positive and finite, got {loss_scale}")
    require_unpartitioned(model, "select()")
    reshard(model)
    rule_of = parameter_rules(model, **rules)
    parameters = shaped_parameters(model)
    require_ranked(rule_of, parameters)
    ranked = {name: parameters[name] for name, rule in rule_of.items() if rule.action == "rank"}
    chosen.reset()
    ranker = Ranker(policy, chosen, rule_of, ranked, loss_scale)
    notes: dict[str, Any] = {"policy": str(policy), "criterion": chosen.name}
    if chosen.needs_gradient and ranked:
        if batches is None or loss is None:
            raise ValueError(f"criterion {chosen.name!r} needs gradients: pass batches and loss")
        group = process_group or process_group_of(model, ranked)
        if group is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError(
                f"{dist.get_world_size()} processes run, and each would rank gradients of its own data, which gives "
                "different masks: pass process_group=torch.distributed.group.WORLD to add the gradients of all, or "
                "select in one process and load the selection in the others"
            )
        plan = make_plan(ranked, batches, memory, max_gradient_bytes, offload, group)
        with preserved(model), standing_in(model, ranked):
            seen = collect(
                model, ranked, batches, loss, plan, ranker.add,
                each_batch=chosen.each_batch, loss_scale=loss_scale, group=group, quiet=_quiet(progress),
            )  # fmt: skip
        notes |= {"batches": seen.batches, "memory": plan.sentence}
        report_missing([name for name in ranked if name not in seen.names], rule_of)
    else:
        for name in tqdm(ranked, desc="ranking", unit="tensor", disable=_quiet(progress), leave=False):
            ranker.add(name, None)
    notes |= ranker.report()

    found = ranker.masks()
    masks = {name: found.get(name) or unranked(rule, tuple(parameters[name].shape)) for name, rule in rule_of.items()}
    if ranked and not any(mask.nnz for mask in found.values()):
        raise ValueError(f"{policy} selects nothing of the {len(ranked)} ranked parameters; ask for more entries")
    if not any(mask.nnz for mask in masks.values()):
        raise ValueError("nothing would be trained: the rules leave no parameter to rank or to train whole")
    return Selection(masks, notes, fingerprints(model))


def require_ranked(rules: Mapping[str, Rule], parameters: Mapping[str, Tensor]) -> None:
    """Refuses weights that cannot be ranked because of how or where they are stored."""
    absent = [name for name, rule in rules.items() if rule.action != "freeze" and parameters[name].is_meta]
    if absent:
        raise ValueError(
            f"{len(absent)} parameters are on the meta device, first {absent[0]}: they are not loaded, or offloaded by "
            "accelerate; load the whole model before selecting, or freeze them by name"
        )
    blocked = [name for name, rule in rules.items() if rule.blocked]
    if blocked:
        raise ValueError(
            f"{len(blocked)} weights would be ranked but cannot be, first {blocked[0]}: it is "
            f"{rules[blocked[0]].reason}. Select on the model before it is quantised or sharded, or freeze these "
            f"weights by name: select(..., freeze=[{blocked[0]!r}])"
        )


def report_missing(missing: list[str], rules: Mapping[str, Rule]) -> None:
    """Ranked parameters that got no gradient: an error for one that the caller named, a warning for the others."""
    for name in missing:
        if rules[name].named:
            raise ValueError(f"{name} was named to be ranked, but got no gradient: the loss does not depend on it")
    if missing:
        names = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        warnings.warn(
            f"{len(missing)} ranked parameters got no gradient and are frozen: {names}. Either the loss does not "
            "depend on them, or their gradient is lost on the way, as in activation checkpointing with "
            "use_reentrant=True where no input of the checkpointed part requires grad (use_reentrant=False keeps it)",
            stacklevel=user_stacklevel(),
        )


@contextmanager
def standing_in(model: nn.Module, ranked: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Inside, gradients of quantised weights go to their stand-ins."""
    used = []
    for name, uses in parameter_uses(model).items():
        stand_in = ranked.get(name)
        if isinstance(stand_in, StandIn):
            for _, module, _ in uses:
                if installed(module) is not None:
                    raise ValueError(f"a delta has been applied to the quantised {name}; revert it before selecting")
                used.append((module, Ranked(module, name, stand_in)))
    try:
        for module, forward in used:
            install(module, forward)
        yield
    finally:
        for module, _ in used:
            uninstall(module)


def unranked(rule: Rule, shape: tuple[int, ...]) -> Mask:
    if rule.action == "whole":
        return Whole(shape)
    return Frozen(shape, "no gradient" if rule.action == "rank" else rule.reason)


def require_uneven(policy: Policy, criterion: Criterion) -> None:
    """Refuses to rank whole inputs by scores that give all of them the same."""
    if isinstance(policy, Columns) and criterion.even:
        raise ValueError(
            f"criterion {criterion.name!r} gives all inputs of a weight the same score, so {policy} has nothing to "
            "rank them by; choose another criterion"
        )


class Ranker:
    """Turns gradients into scores and passes them to the policy, one parameter at a time."""

    def __init__(
        self,
        policy: Policy,
        criterion: Criterion,
        rules: Mapping[str, Rule],
        ranked: Mapping[str, nn.Parameter],
        loss_scale: float,
    ) -> None:
        require_uneven(policy, criterion)
        self._criterion = criterion
        self._rules = rules
        self._parameters = ranked
        self._loss_scale = loss_scale
        self._k = policy.k_of_rows if criterion.by_entry else None
        self._of_shards: dict[str, Mask] = {}
        self._ranking: Ranking = policy.start(sizes_of(rules, ranked))
        self._silent: dict[str, int] = {}  # number of neurons whose scores are all zero
        self._zeros = self._entries = 0

    @torch.no_grad()
    def add(self, name: str, grad: Tensor | None) -> None:
        """Ranks one parameter by the sum of its gradients; of a DTensor, this rank's shard of it."""
        parameter, view = self._parameters[name].detach(), self._rules[name].view
        stand_in = self._parameters[name]
        if isinstance(stand_in, StandIn):
            parameter = stand_in.quantised.dense(stand_in.dtype)
        elif is_sharded(parameter):
            if self._k is not None and is_by_matrix(parameter, view) and self._ranked_by_shards(name, grad, self._k):
                return
            grad = None if grad is None else gathered(grad, parameter)
            parameter = whole_of(parameter)
        matrix = None if grad is None else view.of(grad)
        score = self._score(name, view.of(parameter), matrix)
        if score.numel():
            peaks = gk.gather_rows(score, gk.topk_rows(score, 1))  # NaN and inf rank first
            if not bool(peaks.isfinite().all()):
                self._refuse(name, score, parameter, grad)
            if silent := int((peaks == 0).sum()):
                self._silent[name] = silent
        if grad is not None:
            self._zeros += grad.numel() - int(torch.count_nonzero(grad))
            self._entries += grad.numel()
        self._ranking.add(name, Scores(score, tuple(parameter.shape), view, self._criterion.squared))

    def _ranked_by_shards(self, name: str, grad: Tensor | None, k: int) -> bool:
        """Ranks a DTensor without gathering it; False if a score is not finite, which the whole of it explains."""
        parameter, view = self._parameters[name].detach(), self._rules[name].view
        score = self._score(name, view.of(local_of(parameter)), None if grad is None else view.of(grad))
        best = best_of_rows(score, parameter, k)
        if not best.finite:
            return False
        if best.silent:
            self._silent[name] = best.silent
        if grad is not None:
            counts = torch.tensor([grad.numel() - int(torch.count_nonzero(grad)), grad.numel()], device=grad.device)
            zeros, entries = sum_over_shards(counts, parameter).tolist()
            self._zeros += zeros
            self._entries += entries
        self._of_shards[name] = PerRow(best.cols, tuple(parameter.shape), view)
        return True

    def _score(self, name: str, weight: Tensor, grad: Tensor | None) -> Tensor:
        weight = weight if grad is None else weight.to(grad.device)
        score = self._criterion.score(weight, grad)
        what = f"criterion {self._criterion.name!r} returned"
        if not isinstance(score, Tensor) or not score.is_floating_point():
            found = score.dtype if isinstance(score, Tensor) else type(score).__name__
            raise TypeError(f"{what} {found} for {name}, expected a tensor of floating-point scores")
        if score.shape != weight.shape:
            raise ValueError(f"{what} {list(score.shape)} for {name}, expected the scores {list(weight.shape)}")
        return score

    def _refuse(self, name: str, score: Tensor, weight: Tensor, grad: Tensor | None) -> None:
        hint = "look for an overflow in half precision or a division by zero in the loss"
        if self._loss_scale > 1:
            hint = f"lower loss_scale={self._loss_scale:g}, or {hint}"
        if grad is not None and not bool(grad.isfinite().all()):
            at_fault, what = grad, f"gradient of {name}"
        elif not bool(weight.isfinite().all()):
            at_fault, what, hint = weight, f"weight {name}", "load the model again"
        else:
            at_fault, what = score, f"score of {name} by {self._criterion.name!r}"
        bad = int((~at_fault.isfinite()).sum())
        raise ValueError(f"the {what} is not finite ({bad} of {at_fault.numel()} entries); {hint}")

    def masks(self) -> dict[str, Mask]:
        """The masks of all ranked parameters."""
        found = self._ranking.finish() | self._of_shards
        return {name: mask.to(self._parameters[name].device) for name, mask in found.items()}

    def report(self) -> dict[str, Any]:
        """Notes on zero gradients; warns about neurons whose scores are all zero."""
        notes: dict[str, Any] = {}
        if self._zeros:
            notes["gradient entries that are zero"] = f"{100 * self._zeros / self._entries:.1f} %"
        if self._silent:
            count = sum(self._silent.values())
            notes["neurons that score zero"] = count
            worst = max(self._silent, key=lambda name: self._silent[name])
            hint = " Under fp16 autocast gradients may underflow: raise loss_scale." if self._entries else ""
            warnings.warn(
                f"{count} neurons score zero everywhere (most in {worst}: {self._silent[worst]}), so all of their "
                f"inputs tie.{hint}",
                stacklevel=user_stacklevel(),
            )
        return notes


def _quiet(progress: bool | None) -> bool | None:
    return None if progress is None else not progress  # tqdm's None: only on a terminal
