"""Every method of the comparison as it is applied to a model: parameter-efficient baselines, full fine-tuning, ours.

The baselines follow their papers and published code where these agree, and each states its setting. Whatever a method
does not train requires no gradient, so that autograd computes and keeps no more than the method needs. Methods that
start as the pre-trained model (adapters, LoRA) or near it (SSF) are initialised accordingly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam, AdamW

import gradsel
from benchmarks.training.models import RATE, Contender, Method, Task
from gradsel.papers.vit import VisionTransformer

Build = Callable[[nn.Module], Contender]


def adamw(parameters: Iterable[nn.Parameter]) -> AdamW:
    return AdamW(parameters, RATE, fused=True)


def with_head(task: Task, model: nn.Module, names: Callable[[str], bool] = lambda name: False) -> Contender:
    """Trains the head and the parameters whose names say so; all others are frozen."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(names(name) or (task.head is not None and f".{task.head}." in f".{name}"))
    return Contender(model, task.loss, adamw(gradsel.trainable_parameters(model)))


def floor(task: Task) -> Build:
    """Forward, and the gradient of every layer's input down to the first layers that ours trains, and nothing else."""

    def build(model: nn.Module) -> Contender:
        model.requires_grad_(False)
        for name in task.entrances:
            model.get_submodule(name).register_forward_hook(lambda module, args, output: output.requires_grad_())
        return Contender(model, task.loss)

    return build


def full(task: Task) -> Build:
    """All parameters; torch's fused AdamW."""
    return lambda model: Contender(model, task.loss, adamw(model.parameters()))


def linear_probe(task: Task) -> Build:
    """The head alone."""
    return lambda model: with_head(task, model)


def bias(task: Task) -> Build:
    """BitFit (Ben Zaken et al., ACL 2022): all biases, those of normalisation included, and the head."""
    return lambda model: with_head(task, model, lambda name: name.endswith("bias"))


class ScaleShift(nn.Module):
    """An operation followed by one factor and one summand for each of its output features."""

    def __init__(self, operation: nn.Module) -> None:
        super().__init__()
        self.operation = operation
        self.scale = nn.Parameter(torch.empty_like(operation.bias))
        self.shift = nn.Parameter(torch.empty_like(operation.bias))
        nn.init.normal_(self.scale, mean=1, std=0.02)
        nn.init.normal_(self.shift, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        y = self.operation(x)
        shape = (-1, 1, 1) if y.ndim == 4 else (-1,)  # features come second in images and last in tokens
        return torch.addcmul(self.shift.view(shape), y, self.scale.view(shape))

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The operation with both in its weight and bias."""
        operation = self.operation
        operation.weight.mul_(self.scale.view(-1, *[1] * (operation.weight.ndim - 1)))
        operation.bias.mul_(self.scale).add_(self.shift)
        return operation


def replaced(model: nn.Module, kinds: tuple[type, ...], make: Callable[[nn.Module], nn.Module], skip: str = "") -> None:
    """Replaces every module of some kinds by what ``make`` returns for it, except below the child ``skip``."""
    for name, module in list(model.named_modules()):
        if isinstance(module, kinds) and name.partition(".")[0] != skip:
            parent, _, short = name.rpartition(".")
            setattr(model.get_submodule(parent), short, make(module))


def merge_ssf(model: nn.Module) -> nn.Module:
    replaced(model, (ScaleShift,), lambda module: module.merged())
    return model


def ssf(task: Task) -> Build:
    """SSF (Lian et al., NeurIPS 2022): scale and shift behind every linear layer, normalisation and patch embedding.

    Placed and initialised as in the authors' code, N(1, 0.02) and N(0, 0.02); merged into the weights for inference.
    """

    def build(model: nn.Module) -> Contender:
        model.requires_grad_(False)
        replaced(model, (nn.Linear, nn.LayerNorm, nn.Conv2d), ScaleShift, skip=task.head or "")
        contender = with_head(task, model, lambda name: name.endswith((".scale", ".shift")))
        contender.merge = merge_ssf
        return contender

    return build


class Prompted(nn.Module):
    """A vision transformer in which every block sees prompt tokens of its own, after the class token."""

    def __init__(self, model: VisionTransformer, prompts: int) -> None:
        super().__init__()
        self.model = model
        dim, projection = model.norm.weight.numel(), model.patch_embed.proj
        bound = math.sqrt(6 / (projection.weight[0].numel() + dim))  # Xavier's, of the patch embedding
        self.prompts = nn.Parameter(model.norm.weight.new_empty(len(model.blocks), prompts, dim))
        nn.init.uniform_(self.prompts, -bound, bound)

    def forward(self, images: Tensor) -> Tensor:
        model = self.model
        tokens = model.patch_embed(images)
        tokens = torch.cat([model.cls_token.expand(len(tokens), -1, -1), tokens], dim=1) + model.pos_embed
        others = 1  # where the patches begin; the next block does not see what this one makes of its prompts
        for block, prompts in zip(model.blocks, self.prompts, strict=True):
            own = prompts.expand(len(tokens), -1, -1)
            tokens = block(torch.cat([tokens[:, :1], own, tokens[:, others:]], dim=1))
            others = 1 + len(prompts)
        return model.head(model.norm(tokens[:, 0].contiguous()))


def vpt(task: Task, prompts: int = 50) -> Build:
    """VPT-Deep (Jia et al., ECCV 2022): tokens in every block's input, 50 of them as in the cost figures of SSF and
    GPS; uniform as in the authors' code, without dropout."""

    def build(model: nn.Module) -> Contender:
        return with_head(task, Prompted(model, prompts), lambda name: name == "prompts")

    return build


# --- Adapters and LoRA -------------------------------------------------------------------------------------------


class Adapter(nn.Module):
    """A sublayer followed by a bottleneck with a residual connection around it; initially the identity."""

    def __init__(self, sublayer: nn.Module, dim: int, bottleneck: int) -> None:
        super().__init__()
        weight = next(sublayer.parameters())
        self.sublayer = sublayer
        self.down = nn.Linear(dim, bottleneck).to(weight)
        self.up = nn.Linear(bottleneck, dim).to(weight)
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.sublayer(x)
        return y + self.up(F.gelu(self.down(y)))


def adapter(task: Task, places: tuple[str, ...] = ("attn", "mlp"), bottleneck: int = 64) -> Build:
    """Adapters of Houlsby et al. (ICML 2019), behind attention and MLP and ahead of the block's own residual; those of
    Pfeiffer et al. (EACL 2021) behind the MLP alone. Bottleneck 64, GELU; normalisation stays frozen, as is usual for
    vision transformers."""

    def build(model: nn.Module) -> Contender:
        for block in model.blocks:
            for place in places:
                setattr(block, place, Adapter(getattr(block, place), block.norm1.weight.numel(), bottleneck))
        return with_head(task, model, lambda name: ".down." in name or ".up." in name)

    return build


def lora(task: Task, rank: int = 8, autocast: torch.dtype | None = None, exact: bool = True) -> Build:
    """LoRA (Hu et al., ICLR 2022) by PEFT, on every linear layer of the blocks, without dropout.

    Args:
        autocast: for models in half precision, whose adapters PEFT makes float32.
        exact: keep them float32; otherwise adapters get the dtype of the model, which is faster.
    """

    def build(model: nn.Module) -> Contender:
        import peft

        saved = None if task.head is None else [task.head]
        config = peft.LoraConfig(r=rank, lora_dropout=0.0, target_modules=task.layers, modules_to_save=saved)
        adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=exact)
        contender = Contender(adapted, task.loss, adamw(gradsel.trainable_parameters(adapted)), autocast=autocast)
        contender.merge = lambda adapted: adapted.merge_and_unload()
        return contender

    return build


# --- GPS and GRFT ------------------------------------------------------------------------------------------------


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def published(task: Task, policy: Any) -> Build:
    """GPS as its published code trains: dense Adam on dense gradients that are multiplied by dense masks."""

    def build(model: nn.Module) -> Contender:
        selection = task.select(device_of(model), policy)
        gradsel.freeze(model, selection)
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        masked = [(p, selection[name].to_dense().to(p.dtype)) for name, p in named if not selection[name].is_whole]

        def mask() -> None:
            for parameter, dense in masked:
                parameter.grad.mul_(dense)

        optimizer = Adam([parameter for _, parameter in named], RATE, fused=True)
        return Contender(model, task.loss, optimizer, mask, selection=selection)

    return build


def detached(model: nn.Module) -> nn.Module:
    gradsel.detach(model)
    return model


def ours(task: Task, policy: Any, criterion: str = "gradient", pull: float = 0.0) -> Build:
    """Attached, with MaskedAdam; ``pull`` is GRFT's to the pre-trained weights."""

    def build(model: nn.Module) -> Contender:
        selection = task.select(device_of(model), policy, criterion)
        gradsel.attach(model, selection)
        trained: Any = gradsel.trainable_parameters(model)
        if pull:
            trained = gradsel.anchored_groups(model, pull, task.regular_blocks)
        return Contender(model, task.loss, gradsel.MaskedAdam(trained, RATE), merge=detached, selection=selection)

    return build


# --- All of them -------------------------------------------------------------------------------------------------

LORA, FULL = "LoRA", "full fine-tuning"  # what others are compared with
PUBLISHED, OURS = "GPS as published", "GPS, attached"
SERVED = OURS, "GPS, detached"
PULL = 1e-4
DENSE = "weights, gradients and Adam's moments in bfloat16"


def generic(task: Task, dtype: torch.dtype, ks: tuple[int, ...]) -> list[Method]:
    """The methods that work on any model, the most important ones first."""
    half = dtype is not torch.float32
    dense, exact = (DENSE, "selected values in float32") if half else ("", "")
    pulled = ", ".join(filter(None, (exact, f"pull {PULL:g}")))
    return [
        Method(FULL, 0, full(task), (FULL, None), dense),
        *loras(task, dtype),
        *(Method(OURS, k, ours(task, gradsel.PerNeuron(k)), SERVED if k == 1 else (None, None), exact) for k in ks),
        Method("GRFT rows, attached", 3, ours(task, gradsel.Rows(3), pull=PULL), note=pulled),
        Method("GRFT columns, attached", 3, ours(task, gradsel.Columns(3), pull=PULL), note=pulled),
        Method("random, attached", 1, ours(task, gradsel.PerNeuron(1), "random"), note=exact),
        Method(PUBLISHED, 1, published(task, gradsel.PerNeuron(1)), note=dense),
        Method("floor", 0, floor(task), note="forward and input gradients only"),
    ]


def loras(task: Task, dtype: torch.dtype) -> list[Method]:
    """LoRA as PEFT and transformers' Trainer do it; in half precision also in a faster way."""
    if dtype is torch.float32:
        return [Method(LORA, 8, lora(task), ("LoRA, unmerged", "LoRA, merged"))]
    usual = "weights in bfloat16, adapters in float32 under autocast, as PEFT and Trainer do"
    name = f"{LORA}, bfloat16 adapters"
    return [
        Method(LORA, 8, lora(task, autocast=dtype), ("LoRA, unmerged", "LoRA, merged"), usual),
        Method(name, 8, lora(task, exact=False), (f"{name}, unmerged", None), "no autocast"),
    ]


def for_vit(task: Task, dtype: torch.dtype, ks: tuple[int, ...] = (1, 2, 10)) -> list[Method]:
    """The generic methods, and those that are written for our vision transformer."""
    note = DENSE if dtype is not torch.float32 else ""
    return [
        *generic(task, dtype, ks),
        Method("linear probe", 0, linear_probe(task), note=note),
        Method("bias", 0, bias(task), note=note),
        Method("SSF", 0, ssf(task), ("SSF, unmerged", "SSF, merged"), note),
        Method("VPT-Deep", 50, vpt(task), ("VPT-Deep", None), note),
        Method("adapter (Houlsby)", 64, adapter(task), ("adapter (Houlsby)", None), note),
        Method("adapter (Pfeiffer)", 64, adapter(task, ("mlp",)), ("adapter (Pfeiffer)", None), note),
    ]
