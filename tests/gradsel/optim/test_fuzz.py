"""Random training runs: no frozen bit ever changes, and stopping half-way makes no difference."""

from __future__ import annotations

import copy
import io
import random
from collections import Counter

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import gradsel
import gradsel_kernels as gk
from gradsel.masks import Flat, Frozen, PerRow, Whole, WholeColumns, WholeRows
from gradsel.views import NeuronView
from tests.kernels.cases import same_bits

RUNS = 1000
DTYPES = [torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64]
OPTIONS = {
    "lr": [1e-3, 0.1, 1.0],
    "betas": [(0.9, 0.999), (0.5, 0.6), (0.0, 0.9)],
    "eps": [1e-8, 1e-3],
    "weight_decay": [0.0, 0.01, 3.0],
    "decoupled_weight_decay": [False, True],
    "amsgrad": [False, True],
    "maximize": [False, True],
    "fused": [None, True],
    "anchor": [0.0, 0.0, 0.5],
    "anchor_decoupled": [False, True],
    "anchor_norm": [1, 2],
    "low_precision": ["master", "kahan", "stochastic"],
    "seed": [0, 7],
    "state_dtype": [None, None, torch.bfloat16],
}
SCHEDULERS = [
    lambda o: None,
    lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.7**t),
    lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20, cycle_momentum=False),
    lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
]
CLIPS = [None, "selected", "torch"]
#: What a frozen entry may hold. NaN payloads and the signs of zeros must survive.
SPECIAL = [float("nan"), float("inf"), -float("inf"), -0.0, 1e-42]


class Holder(nn.Module):
    """A weight of any shape and layout, read directly, so that an attached model takes the harvest route."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)


class Config:
    """One random run, determined by its number."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        pick = self.random.choice
        self.generator = torch.Generator().manual_seed(seed)
        self.options = {name: pick(values) for name, values in OPTIONS.items()}
        self.dtype, self.attached = pick(DTYPES), pick([False, True])
        self.schedule, self.clip, self.scaled = pick(SCHEDULERS), pick(CLIPS), pick([False, False, True])
        self.backend = pick(["reference", "native", "native"])
        self.poison = pick([None, None, float("nan"), float("inf")])
        self.stop = self.random.randrange(1, 4)
        self.model = nn.ModuleDict()
        masks = {}
        for number in range(self.random.randrange(1, 4)):
            weight = self.weight()
            self.model[f"m{number}"] = Holder(weight)
            masks[f"m{number}.weight"] = self.mask(weight.shape)
        self.selection = gradsel.Selection(masks)
        with torch.no_grad():  # frozen entries hold the values that are hardest to preserve
            for name, p in self.model.named_parameters():
                frozen = ~masks[name].to_dense()
                special = torch.tensor(SPECIAL).to(p.dtype)[self.integers(len(SPECIAL), p.shape)]
                p.copy_(torch.where(frozen & (self.integers(3, p.shape) == 0), special, p))

    def integers(self, end, shape):
        return torch.randint(end, tuple(shape), generator=self.generator)

    def weight(self):
        """A tensor of up to four dimensions: contiguous, transposed, channels last, or with gaps in its memory."""
        r = self.random
        shape = [r.randrange(1, 6) for _ in range(r.randrange(1, 5))]
        layout = r.choice(["contiguous", "transposed", "gaps", "channels last"])
        dense = torch.randn(shape, generator=self.generator).to(self.dtype)
        if layout == "transposed" and len(shape) == 2:
            return dense.t().contiguous().t()
        if layout == "gaps" and len(shape) == 2 and not self.attached:
            return torch.cat([dense, dense], 1)[:, : shape[1]]
        if layout == "channels last" and len(shape) == 4:
            return dense.to(memory_format=torch.channels_last)
        return dense

    def mask(self, shape):
        kinds = ["flat", "whole", "frozen"]
        kind = self.random.choice(kinds if len(shape) < 2 else [*kinds, "per row", "rows", "columns", "flat"])
        if kind == "flat":
            return Flat(self.integers(3, (shape.numel(),)).eq(0).nonzero().view(-1), shape)
        if kind == "whole":
            return Whole(shape)
        if kind == "frozen":
            return Frozen(shape)
        views = [NeuronView(), NeuronView((1,)), *([NeuronView((0, 1))] if len(shape) > 2 else [])]
        view = self.random.choice(views)
        rows, n = view.shape(tuple(shape))
        if kind == "per row":
            k = self.random.randrange(1, n + 1)
            cols = torch.stack([torch.randperm(n, generator=self.generator)[:k].sort().values for _ in range(rows)])
            return PerRow(cols.to(torch.int32), shape, view)
        of, end = (WholeRows, rows) if kind == "rows" else (WholeColumns, n)
        lines = torch.randperm(end, generator=self.generator)[: self.random.randrange(1, end + 1)].sort().values
        return of(lines.to(torch.int32), shape, view)

    def grads(self):
        """A dense gradient for each weight, None for some, with poison at some entries."""
        grads = {}
        weights = dict(self.model.named_parameters())
        for name in self.selection:
            p = weights[name]
            grad = torch.randn(p.shape, generator=self.generator).to(p.dtype)
            if self.poison is not None:
                grad = torch.where(self.integers(4, p.shape) == 0, torch.tensor(self.poison).to(p.dtype), grad)
            grads[name] = None if self.random.random() < 0.1 else grad
        return grads


class Run:
    """A model with its optimizer, scheduler and scaler."""

    def __init__(self, config, model):
        self.config, self.model = config, model
        self.names = [name for name, _ in model.named_parameters()]
        if config.attached:
            gradsel.attach(model, config.selection)
            self.optimizer = gradsel.MaskedAdam(self.trained(), **config.options)
        else:
            self.optimizer = gradsel.MaskedAdam(model.named_parameters(), masks=config.selection, **config.options)
        self.scheduler = config.schedule(self.optimizer)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=config.scaled)

    def trained(self):
        return gradsel.trainable_parameters(self.model) or [nn.Parameter(torch.zeros(1))]

    def step(self, grads):
        config, weights = self.config, dict(self.model.named_parameters())
        for name, grad in grads.items():
            p, grad = weights[name], None if grad is None else grad * self.scaler.get_scale()
            if config.attached:
                p.grad = None
                mask, values = config.selection[name], weights.get(name + "_values")
                if values is not None:
                    values.grad = None if grad is None else mask.gather(grad).to(values.dtype)
                elif mask.nnz:
                    p.grad = grad
            else:
                p.grad = None if grad is None else torch.empty_like(p).copy_(grad)
        if config.scaled:
            self.scaler.scale(torch.ones(()))
            if not any(p.grad is not None for g in self.optimizer.param_groups for p in g["params"]):
                return  # GradScaler has nothing to look at
            if config.dtype is not torch.float16 and config.clip:
                self.scaler.unscale_(self.optimizer)
        if config.clip == "selected":
            self.optimizer.clip_grad_norm_(1.0)
        elif config.clip == "torch":
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if config.scaled and (config.dtype is not torch.float16 or config.options["fused"]):
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        if isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(1.0)
        elif self.scheduler is not None:
            self.scheduler.step()

    def saved(self):
        file = io.BytesIO()
        parts = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        parts["scaler"] = self.scaler.state_dict()
        torch.save(parts, file)
        file.seek(0)
        return torch.load(file, weights_only=True), copy.deepcopy(self.scheduler and self.scheduler.state_dict())

    def load(self, saved):
        parts, schedule = saved
        if self.scheduler is not None:
            self.scheduler.load_state_dict(schedule)
        self.model.load_state_dict(parts["model"])
        self.optimizer.load_state_dict(parts["optimizer"])
        self.scaler.load_state_dict(parts["scaler"])

    def weights(self):
        return {name: p.detach() for name, p in self.model.named_parameters() if name in self.names}


def frozen_of(weights, selection):
    return {name: p[~selection[name].to_dense()].clone() for name, p in weights.items()}


def one_nan(tensor):
    """All NaN as one: when a state is loaded, torch rounds a trained NaN to other bits than the kernels do."""
    return torch.where(tensor.isnan(), float("nan"), tensor)


def changed_bits(before, after):
    return [name for name in before if not same_bits(before[name], after[name])]


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step", "ignore:.*got no gradient in the first backward")
@pytest.mark.parametrize("part", range(10))
def test_no_frozen_bit_changes_and_a_resumed_run_is_the_same(part):
    moved, kinds = 0, Counter()
    for seed in range(part, RUNS, 10):
        config = Config(seed)
        fresh = copy.deepcopy(config.model)
        with gk.use_backend(config.backend):
            run = Run(config, config.model)
            start = {name: p.clone() for name, p in run.weights().items()}
            before = frozen_of(start, config.selection)
            for t in range(4):
                if t == config.stop:
                    resumed = Run(config, fresh)
                    resumed.load(run.saved())
                grads = config.grads()
                run.step(grads)
                if t >= config.stop:
                    resumed.step(grads)
        assert not changed_bits(before, frozen_of(run.weights(), config.selection)), seed
        assert not changed_bits(before, frozen_of(resumed.weights(), config.selection)), seed
        for p, q in zip(run.model.state_dict().values(), resumed.model.state_dict().values(), strict=True):
            assert same_bits(one_nan(p), one_nan(q)), seed
        moved += bool(changed_bits(start, run.weights()))
        kinds.update(mask.kind for mask in config.selection.values())
    assert moved > 60
    assert len(kinds) == 6


def test_the_same_runs_change_frozen_bits_with_torch_s_adamw():
    """Masking gradients is not enough: weight decay and earlier moments still move entries outside the selection."""
    changed = 0
    for seed in range(100):
        config = Config(seed)
        config.poison = None
        for p in config.model.parameters():
            p.data = p.data.nan_to_num(1.0, 1.0, -1.0)
        optimizer = torch.optim.AdamW(config.model.parameters(), lr=0.1, foreach=False)
        weights = dict(config.model.named_parameters())
        before = frozen_of({name: p.detach() for name, p in weights.items()}, config.selection)
        for _ in range(3):
            for name, grad in config.grads().items():
                weights[name].grad = None if grad is None else grad * config.selection[name].to_dense()
            optimizer.step()
        after = frozen_of({name: p.detach() for name, p in weights.items()}, config.selection)
        changed += bool(changed_bits(before, after))
    assert changed > 60
