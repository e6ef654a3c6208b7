"""Checkpoints of transformers' Trainer that hold what is trained instead of the whole model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from transformers.trainer_callback import TrainerCallback

from gradsel.attached import is_attached, is_values
from gradsel.delta.delta import Delta
from gradsel.delta.exporting import export, is_of_transformers
from gradsel.delta.hub import FILE
from gradsel.delta.pretrained import save_pretrained
from gradsel.delta.trained import trained_in
from gradsel.masks import Frozen, Mask, same
from gradsel.methods.base import SELECTION
from gradsel.nn.buffers import saved_buffers
from gradsel.optim import MaskedAdam
from gradsel.parameters.names import named_parameters, strip_wrappers, unwrapped
from gradsel.selection.selection import Selection
from gradsel.tensor_files import load_file, save_file
from gradsel.training.checkpoints import require_whole

#: The values of everything that is trained, and of the buffers.
TRAINED = "trained.safetensors"
STATE = "trainer_state.json"
#: The sum of the losses since the last one that was logged, of each process, and the step of that.
LOSS = "loss.json"


class SparseSaving:
    """How a Trainer saves and loads with :class:`SparseCheckpoints`; a base before its own class."""

    #: Whether a checkpoint is being saved, and not the model for its users.
    _is_checkpoint = False
    #: Whether an optimizer with masks has trained nothing but these, so that only these need to be saved.
    _masks_are_all = True
    _resumed: dict[str, Any] | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; True finds the last complete checkpoint, and damaged ones are refused."""
        if resume_from_checkpoint is True:
            folder = Path(_of(self).args.output_dir)
            found = last_checkpoint(folder)
            if found is None:
                raise ValueError(
                    f"resume_from_checkpoint=True: {folder} has no complete checkpoint; leave it out to begin anew"
                )
            resume_from_checkpoint = str(found)
        if resume_from_checkpoint:
            if not Path(resume_from_checkpoint).is_dir():
                raise ValueError(f"resume_from_checkpoint: there is no folder {resume_from_checkpoint}")
            require_whole(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        trainer = _of(self)
        model = unwrapped(trainer.model)
        if not self._is_checkpoint and not is_attached(model):
            super()._save(output_dir, state_dict)  # type: ignore[misc]
            return
        if not trainer.args.should_save:
            return
        folder = Path(trainer.args.output_dir if output_dir is None else output_dir)
        if self._is_checkpoint:
            folder.mkdir(parents=True, exist_ok=True)
            selection = selection_of(model) if is_attached(model) else self._selection_of_optimizer()
            save_file(_compact(model, selection), str(folder / TRAINED))
            if selection is not None:
                selection.save(folder / SELECTION)
        else:
            _save_plain(model, folder)
            torch.save(trainer.args, folder / "training_args.bin")
        own = trainer.processing_class
        own = getattr(trainer.data_collator, "tokenizer", None) if own is None else own
        if own is not None:
            own.save_pretrained(folder)

    def _selection_of_optimizer(self) -> Selection | None:
        """What an optimizer trains of the parameters of a plain model, if it has never trained anything else."""
        optimizer = getattr(_of(self).optimizer, "optimizer", _of(self).optimizer)
        if not isinstance(optimizer, MaskedAdam) or optimizer._own_masks or optimizer.has_reselected:
            return None
        return optimizer.selection if self._masks_are_all else None

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        trainer = _of(self)
        folder = Path(trainer._get_output_dir(trial=trial)) / f"checkpoint-{trainer.state.global_step}"
        sums = trainer.accelerator.gather(trainer._tr_loss.reshape(1)).tolist()
        if trainer.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / LOSS).write_text(json.dumps({"sums": sums, "step": trainer._globalstep_last_logged}))
        self._is_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        finally:
            self._is_checkpoint = False

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)  # type: ignore[misc]
        if _of(self).args.world_size > 1:
            dist.barrier()  # the state of the run, which makes a checkpoint complete, is written after all of these

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        model = unwrapped(_of(self).model if model is None else model)
        load_trained(model, folder)
        self._masks_are_all = is_attached(model) or (folder / SELECTION).is_file()
        self._resumed = json.loads((folder / LOSS).read_text())

    def _load_best_model(self) -> None:
        if _of(self).args.world_size > 1:
            dist.barrier()  # rank 0 may still be writing
        load_trained(unwrapped(_of(self).model), Path(_of(self).state.best_model_checkpoint))


def _save_plain(model: nn.Module, folder: Path) -> None:
    """Saves an attached model as the plain one, and its delta, for ``from_pretrained`` and for servers."""
    if is_of_transformers(model):
        save_pretrained(model, folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    export(model, folder)
    Delta.of(model).save(folder / FILE, originals=True)


def _of(saving: SparseSaving) -> Any:
    """The same object, as the Trainer that it is."""
    return saving


class SparseCheckpoints(TrainerCallback):
    """Makes the checkpoints of any Trainer those of ``gradsel finetune``: small, and resumed bit for bit.

    A checkpoint has the values of the trained parameters and of the buffers, the selection, the optimizer, the
    schedule, the state of all random numbers, and the loss so far, but not the frozen weights. So a run that is killed
    and resumed ends with the bits of one that was not. ``save_total_limit``, the best checkpoint, early stopping,
    accumulation, mixed precision and DistributedDataParallel work as usual; ``save_model()`` and
    ``push_to_hub()`` write the plain model, and the delta of an attached one beside it.

    The model may be attached, or plain with a :class:`gradsel.MaskedAdam` that has masks, or adapted by PEFT, or partly
    frozen in any other way. To resume in a new process, prepare it as before, and add the callback before ``train()``::

        trainer = Trainer(model, arguments, ...)
        trainer.add_callback(SparseCheckpoints(trainer))
        trainer.train(resume_from_checkpoint=True)

    Args:
        trainer: a :class:`transformers.Trainer` or one of a subclass, such as those of TRL. Its class becomes one that
            saves and loads differently.

    Raises:
        TypeError: it is not a Trainer.
        ValueError: it shards the model (FSDP, DeepSpeed), so that no process holds all that is trained.
    """

    def __init__(self, trainer: transformers.Trainer) -> None:
        if not isinstance(trainer, transformers.Trainer):
            raise TypeError(
                f"trainer must be a transformers.Trainer, got {type(trainer).__name__}; make the Trainer first, then "
                "trainer.add_callback(SparseCheckpoints(trainer))"
            )
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError("the Trainer shards the model (FSDP or DeepSpeed); these checkpoints are for whole models")
        if not isinstance(trainer, SparseSaving):
            kind = type(trainer)
            trainer.__class__ = type(kind.__name__, (SparseSaving, kind), {"__module__": kind.__module__})
        self._trainer: Any = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Lets the first loss that a resumed run logs count the steps before it stopped, as if it had not."""
        trainer, found = self._trainer, self._trainer._resumed
        if found is not None:
            sums = found["sums"]
            trainer._tr_loss += sums[args.process_index] if len(sums) == args.world_size else sum(sums) / len(sums)
            trainer._total_loss_scalar = -float(trainer._tr_loss)  # the loss of the whole call is that of its own steps
            trainer._globalstep_last_logged = found["step"]
            trainer._resumed = None


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: parameters that require gradients, and buffers that checkpoints contain, by name."""
    trained = {strip_wrappers(name): p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {**trained, **saved_buffers(model)}


def selection_of(model: nn.Module) -> Selection:
    """The selection that a model is attached to, without fingerprints of its base."""
    trained = trained_in(model)
    plain = {strip_wrappers(name): p for name, p in model.named_parameters() if not is_values(p)}
    masks = {
        name: trained[name].mask if name in trained else Frozen(tuple(parameter.shape), "not trained")
        for name, parameter in plain.items()
    }
    return Selection(masks, {"policy": "that of a checkpoint"})


def load_trained(model: nn.Module, folder: Path) -> None:
    """Loads what a checkpoint of :class:`SparseCheckpoints` holds into a model that is prepared as the saved one was.

    Raises:
        ValueError: it holds something else, or was trained with another selection; nothing has changed.
    """
    if not (folder / TRAINED).is_file():
        raise ValueError(f"{folder} is not a checkpoint of gradsel's Trainer: it has no {TRAINED}")
    selection = Selection.load(folder / SELECTION) if (folder / SELECTION).is_file() else None
    own, masks = trained_state(model), {} if is_attached(model) else _partial(model, selection)
    saved = load_file(str(folder / TRAINED))
    if different := sorted(set(saved) ^ (set(own) - _untouched(masks))):
        raise ValueError(
            f"{folder} was saved by a model that trains other parameters: {len(different)} differ, first {different[0]}"
        )
    for name, tensor in saved.items():
        expected = masks[name].compact_shape if name in masks else tuple(own[name].shape)
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{name} is {list(tensor.shape)} in {folder}, {list(expected)} in the model")
    if is_attached(model):
        for name, trained in trained_in(model).items():
            found = None if selection is None else selection.get(name)
            if found is None or not same(found, trained.mask.to(torch.device("cpu"))):
                raise ValueError(f"{folder} was trained with another selection: {name} differs")
    with torch.no_grad():
        for name, tensor in saved.items():
            target = own[name]
            if name in masks:
                masks[name].to(target.device).scatter_(target, tensor.to(target.device, target.dtype))
            else:
                target.copy_(tensor)


def _compact(model: nn.Module, selection: Selection | None) -> dict[str, Tensor]:
    """Copies of what is trained, of partly selected parameters of a plain model their selected entries."""
    masks = {} if is_attached(model) else _partial(model, selection)
    left_out = _untouched(masks)
    return {
        name: _stored(masks[name].to(tensor.device).gather(tensor) if name in masks else tensor)
        for name, tensor in trained_state(model).items()
        if name not in left_out
    }


def _partial(model: nn.Module, selection: Selection | None) -> dict[str, Mask]:
    """The masks of the parameters of a plain model that are trained in part, or not at all."""
    found = {} if selection is None else {strip_wrappers(name): mask for name, mask in selection.items()}
    return {name: found[name] for name in named_parameters(model) if name in found and not found[name].is_whole}


def _untouched(masks: Mapping[str, Mask]) -> set[str]:
    return {name for name, mask in masks.items() if not mask.nnz}


def _stored(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().clone()


def last_checkpoint(folder: Path) -> Path | None:
    """The last complete checkpoint of a run: its state is written last, so one that was interrupted has none."""
    found = []
    for each in folder.glob("checkpoint-*"):
        number = each.name.rpartition("-")[2]
        try:
            json.loads((each / STATE).read_text())
        except (OSError, ValueError):
            continue
        if number.isdecimal():
            found.append((int(number), each))
    return max(found)[1] if found else None
