"""The demo's methods, which prepare a network for adaptation. :func:`attached` shows how to use this library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import gradsel
from gradsel.demo import plots
from gradsel.demo.data import Split
from gradsel.demo.training import batches, jitter
from gradsel.papers.vit import VisionTransformer
from gradsel.ranking.policies import Policy

BATCH = 32


class Task(NamedTuple):
    """A network that is ready for adaptation."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    trained: int  # number of trained scalars
    delta_bytes: int  # size of the difference in a file
    selection: gradsel.Selection | None = None


#: ``choose(model, data, seed)``
Chooser = Callable[[VisionTransformer, Split, int], gradsel.Selection]
#: ``start(model, data, seed)``
Starter = Callable[[VisionTransformer, Split, int], Task]


def attached(choose: Chooser, anchor: float = 0.0) -> Starter:
    """Trains a selection by attach() and MaskedAdam; backward computes no other weight gradients.

    Args:
        anchor: strength of the pull of all trained weights to their initial values (GRFT, Alg. 1).
    """

    def start(model: VisionTransformer, data: Split, seed: int) -> Task:
        selection = choose(model, data, seed)
        gradsel.attach(model, selection)
        optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(model), anchor=anchor)
        return Task(model, optimizer, selection.trainable_count(), delta_bytes(selection), selection)

    return start


def full(model: VisionTransformer, data: Split, seed: int) -> Task:
    """Trains every weight with torch's Adam."""
    parameters = list(model.parameters())
    count = sum(parameter.numel() for parameter in parameters)
    return Task(model, torch.optim.Adam(parameters, fused=True), count, 4 * count)


def lora(rank: int) -> Starter:
    """Trains two thin matrices beside every matrix of the blocks, and the head: PEFT's LoRA (Hu et al. 2022)."""

    def start(model: VisionTransformer, data: Split, seed: int) -> Task:
        config = LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"],
            modules_to_save=["head"],
        )
        adapted = get_peft_model(model, config)
        parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        count = sum(parameter.numel() for parameter in parameters)
        return Task(adapted, torch.optim.Adam(parameters, fused=True), count, 4 * count)

    return start


def linear_probe(model: VisionTransformer, data: Split, seed: int) -> gradsel.Selection:
    """The head alone."""
    return gradsel.select(model, None, None, criterion="random", freeze=["*"], whole=["head.*"], progress=False)


def chosen(policy: Policy | type[Policy], criterion: str = "gradient", *, head: bool = False) -> Chooser:
    """Selects by a policy and a criterion, with gradients of the supervised contrastive loss.

    Args:
        policy: a policy, or a class of policy, which then gets the budget of ``PerNeuron(1)``.
        criterion: a name that ``gradsel.select`` knows; ``"random"`` depends on the seed.
        head: use the gradients of cross-entropy through the head instead.
    """

    def choose(model: VisionTransformer, data: Split, seed: int) -> gradsel.Selection:
        generator = torch.Generator().manual_seed(seed)

        def view(images: Tensor) -> Tensor:
            return jitter(images, generator)

        def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            return gradsel.cross_entropy(model, (view(batch[0]), batch[1]))

        one_pass = batches(data.images, data.labels, BATCH, generator)
        loss = cross_entropy if head else gradsel.contrastive(augment=view)
        if isinstance(policy, Policy):
            budget = policy
        else:
            budget = gradsel.equal_budget(policy, gradsel.PerNeuron(1), gradsel.ranked_sizes(model).values())
        score = gradsel.random_scores(seed) if criterion == "random" else criterion
        return gradsel.select(model, one_pass, loss, budget, score, progress=False)

    return choose


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    name: str
    rate: float
    start: Starter
    colour: str


#: The method whose first run is saved as a delta.
SAVED = "GPS K=1"

# Every rate is the best of RATES for its method according to tune(), which uses images that the table does not.
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
METHODS = (
    Method("linear probe", 1e-2, attached(linear_probe), plots.GREY),
    Method("full fine-tuning", 3e-3, full, plots.PINK),
    Method("LoRA r=8", 1e-2, lora(8), plots.SKY),
    Method("random K=1", 1e-1, attached(chosen(gradsel.PerNeuron(1), "random")), plots.ORANGE),
    Method("GPS K=1", 3e-2, attached(chosen(gradsel.PerNeuron(1))), plots.BLUE),
    Method("GPS K=3", 3e-2, attached(chosen(gradsel.PerNeuron(3))), plots.GREEN),
)


def delta_bytes(selection: gradsel.Selection) -> int:
    """Bytes of the fine-tuned difference: 4 per value, and 2 per index of a selected entry."""
    return sum(4 * mask.nnz + 2 * sum(t.numel() for t in mask.tensors().values()) for mask in selection.values())
