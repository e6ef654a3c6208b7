"""A script as users write it, with every public name. tests/test_typing.py has mypy check it; nobody runs it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import reveal_type

import gradsel
import gradsel_kernels as gk


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.fc1(x).relu())
        return out


model = Net()
dataset = TensorDataset(torch.randn(64, 8), torch.arange(64) % 3)
loader = DataLoader(dataset, batch_size=16)

# --- Selecting ---------------------------------------------------------------------------------------------------

reveal_type(gradsel.__version__)  # str
reveal_type(gradsel.select(model, loader, gradsel.cross_entropy, gradsel.PerNeuron(1)))  # Selection
selection = gradsel.select(
    model,
    loader,
    gradsel.contrastive(gradsel.features(model), temperature=0.1),
    gradsel.Rows(2),
    criterion=gradsel.random_scores(0),
    rank=["fc1.*"],
    kinds={"bias": "freeze"},
)


def squares(model: Net, batch: tuple[Tensor, Tensor]) -> Tensor:
    return model(batch[0]).square().mean()  # type: ignore[no-any-return]


def largest(weight: Tensor, grad: Tensor) -> Tensor:
    return weight * grad


gradsel.select(model, loader, squares, gradsel.Columns(2), largest)
gradsel.select(model, None, None, criterion="random")
gradsel.select(model, loader, squares, gradsel.ByMass(2))
gradsel.select(model, loader, squares, gradsel.PerLayer(fraction=0.1), gradsel.Criterion("mine", lambda w, g: w))
reveal_type(gradsel.equal_budget(gradsel.Global, gradsel.PerNeuron(1), gradsel.ranked_sizes(model).values()))  # Policy
reveal_type(gradsel.ranked_sizes(model))  # dict[str, tuple[int, int]]
reveal_type(gradsel.trainable_count(model, gradsel.PerNeuron(1)))  # int
reveal_type(gradsel.SupConLoss(temperature=0.07)(torch.randn(4, 8), torch.arange(4)))  # Tensor
reveal_type(gradsel.features(model)(model, torch.randn(2, 8)))  # Tensor
reveal_type(gradsel.cross_entropy(model, next(iter(loader))))  # Tensor
easiest = gradsel.easiest_subset(model, dataset, squares, 4, batches=lambda part: DataLoader(part, batch_size=4))
reveal_type(easiest.losses)  # tuple[float, ...]
reveal_type(gradsel.presets.gps("cub").epochs)  # int | None

reveal_type(selection["fc1.weight"].nnz)  # int
reveal_type(selection.trainable_count())  # int
reveal_type(selection | selection)  # Selection
reveal_type(selection.to_bits())  # dict[str, Tensor]
selection.save("selection.safetensors")
reveal_type(gradsel.Selection.load("selection.safetensors", model))  # Selection

# --- Training ----------------------------------------------------------------------------------------------------

reveal_type(gradsel.attach(model, selection))  # AttachReport
report: gradsel.AttachReport = gradsel.attach(model, selection)
reveal_type(gradsel.trainable_parameters(model))  # list[Parameter]
optimizer: torch.optim.Optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(model), lr=1e-3)
scheduler = CosineAnnealingLR(gradsel.MaskedAdamW(model.named_parameters(), masks=selection), T_max=10)
by_policy = gradsel.MaskedAdamW(model.named_parameters(), policy=gradsel.PerNeuron(1), rules={"head": ["head"]})
reveal_type(by_policy.selection)  # Selection | None
reveal_type(by_policy.clip_grad_norm_(1.0))  # Tensor


def closure() -> float:
    optimizer.zero_grad()
    loss = gradsel.cross_entropy(model, next(iter(loader)))
    loss.backward()  # type: ignore[no-untyped-call]  # torch's, not ours
    return loss.item()


reveal_type(by_policy.step(closure))  # float
by_policy.step()
reveal_type(gradsel.anchored_groups(model, 1e-4, last_blocks=2))  # list[dict[str, Any]]
reveal_type(gradsel.state_bytes(optimizer))  # int
gradsel.freeze(model, selection)
gradsel.sync(model)
reveal_type(gradsel.detach(model))  # Net
reveal_type(gradsel.detach(model, restore=True).fc1)  # Linear

# --- Deltas ------------------------------------------------------------------------------------------------------

reveal_type(gradsel.save_delta(model, "task.safetensors"))  # Delta
delta = gradsel.Delta.load("task.safetensors")
reveal_type(delta | delta)  # Delta
reveal_type(delta["fc1.weight"].values)  # Tensor
applied = delta.apply_(model)
applied.revert_()
with delta.applied(model):
    pass
reveal_type(gradsel.load_delta(model, delta))  # Applied | None
reveal_type(delta.to_lora("adapter", model))  # LoraExport
gradsel.export(model, "full.safetensors")
merged: gradsel.MergeReport = gradsel.merge(model, torch.bfloat16)
bank = gradsel.TaskBank(model)
bank.add("birds", delta)
bank.activate("birds")
reveal_type(bank.active)  # str | None
update: gradsel.Patches = gradsel.patches(model)
reveal_type(update.to_bytes())  # bytes

# --- From data to a result ---------------------------------------------------------------------------------------

reveal_type(gradsel.methods.method("gps", k=1).name)  # str
reveal_type(gradsel.peft.accelerate(model))  # Net
config = gradsel.training.Config.from_dict({"data": {"path": "birds/"}, "model": {"name": "vit"}})
reveal_type(gradsel.finetune(config))  # Result
reveal_type(gradsel.resume("runs/birds"))  # Result
reveal_type(gradsel.evaluate("runs/birds"))  # dict[str, Any]
reveal_type(gradsel.predict("runs/birds", ["photo.jpg"]))  # list[list[tuple[str, float]]]

# --- Kernels -----------------------------------------------------------------------------------------------------

gradient, weight = torch.randn(8, 32), torch.randn(8, 32)
reveal_type(gk.__version__)  # str
reveal_type(gk.topk_rows(gradient, 2))  # Tensor
columns, bits = gk.topk_rows_bits(gradient, 2)
reveal_type(bits)  # Tensor
reveal_type(gk.pack_bits(gradient > 0))  # Tensor
reveal_type(gk.unpack_bits(bits, 32))  # Tensor
reveal_type(gk.gather_rows(weight, columns))  # Tensor
gk.scatter_rows_(weight, columns, torch.zeros(8, 2))
reveal_type(gk.selected_addmm_(torch.zeros(5, 8), torch.randn(5, 32), columns, torch.zeros(8, 2)))  # Tensor
reveal_type(gk.take_columns(torch.randn(5, 32), torch.arange(4, dtype=torch.int32)))  # Tensor
reveal_type(gk.selected_weight_grad(torch.randn(5, 8), torch.randn(5, 32), columns))  # Tensor
reveal_type(gk.selected_weight_grad_bias(torch.randn(5, 8), torch.randn(5, 32), columns))  # tuple[Tensor, Tensor]
state = [torch.zeros(8, 2), torch.zeros(8, 2), torch.zeros(())]
gk.masked_adam_(
    [weight], [gradient], [state[0]], [state[1]], [state[2]], lr=0.1, indices=[columns], layouts=[gk.Layout.COLS]
)
first: gk.FirstStep = gk.topk_masked_adam_([weight], [gradient], 2, lr=0.1)
reveal_type(first.cols)  # list[Tensor]
with gk.use_backend("reference"):
    gk.show_config()
