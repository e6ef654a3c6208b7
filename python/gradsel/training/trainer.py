"""transformers' Trainer for models that train a part of themselves: its checkpoints hold that part alone."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer_callback import TrainerCallback

from gradsel.attached import is_attached
from gradsel.methods import Method
from gradsel.nn.buffers import saved_buffers
from gradsel.optim.adamw import MaskedAdamW
from gradsel.parameters.names import unwrapped
from gradsel.parameters.rules import HEAD
from gradsel.training.averaging import Average
from gradsel.training.recipe import Recipe
from gradsel.training.saving import SparseCheckpoints, SparseSaving, trained_state


class Trainer(SparseSaving, transformers.Trainer):
    """:class:`transformers.Trainer` whose checkpoints hold what is trained instead of the whole model.

    For a model that is attached, adapted by PEFT or partly frozen. A checkpoint has the values of the trained
    parameters and of the buffers, the selection if the model is attached, the optimizer, the schedule and the state of
    all random numbers: a run that is resumed from it goes on as if it had not stopped, bit for bit. To resume in a new
    process, prepare the model as before (``attach(model, Selection.load(checkpoint + "/selection.safetensors"))``) and
    call ``train(resume_from_checkpoint=...)``. Best checkpoint, early stopping, accumulation, clipping, mixed precision
    and several processes work as usual. ``save_model()`` writes the plain model, and the delta of an attached one.

    Without an optimizer an attached model gets :class:`gradsel.MaskedAdamW`, with the rate, betas, epsilon and weight
    decay of the arguments.

    Example::

        model = AutoModelForSequenceClassification.from_pretrained("distilbert/distilbert-base-uncased")
        selection = gradsel.select(model, batches, gradsel.contrastive())
        gradsel.attach(model, selection)
        arguments = TrainingArguments("checkpoints", eval_strategy="epoch", save_strategy="epoch",
                                      load_best_model_at_end=True, learning_rate=1e-3, bf16=True)
        trainer = gradsel.training.Trainer(model, arguments, collate, train_data, validation_data,
                                           callbacks=[EarlyStoppingCallback(3)])
        trainer.train()
        gradsel.save_delta(model, "delta.safetensors", selection=selection)

    Args:
        method: makes the optimizer; see :mod:`gradsel.methods`.
        head: names of the head's modules or parameters, for methods that treat it apart.
        recipe: schedule, mixing, loss, and the average that is evaluated. With it the model may be one of timm, which
            takes a tensor, not a mapping.
        **kwargs: as for :class:`transformers.Trainer`.
    """

    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self, *args: Any, method: Method | None = None, recipe: Recipe | None = None, head: Iterable[str] = HEAD,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        self.method, self.recipe, self.head = method, recipe, tuple(head)
        if recipe is not None:
            self.loss_is_scaled_for_ga = False
        logging.getLogger("transformers.trainer_utils").addFilter(_not_of_times)
        super().__init__(*args, **kwargs)
        self.add_callback(SparseCheckpoints(self))
        self.add_callback(_OwnRandomness)
        self.average: Average | None = None
        if recipe is not None and recipe.config.ema is not None:
            self.average = Average(recipe.config.ema, lambda: trained_state(unwrapped(self.model)))
            self.add_callback(self.average)

    # --- Optimizer and loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        model = self.model if model is None else model
        if self.optimizer is None:
            if self.method is not None and self.recipe is not None:
                config = self.recipe.config
                decoupled = config.optimizer == "adamw"
                self.optimizer = self.method.optimizer(
                    model, self.recipe.rate, config.weight_decay, decoupled, self.head
                )
            elif self.method is not None:
                self.optimizer = self.method.optimizer(
                    model, self.args.learning_rate, self.args.weight_decay, head=self.head
                )
            elif is_attached(model):
                self.optimizer = MaskedAdamW(
                    [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad],
                    lr=self.args.learning_rate,
                    betas=(self.args.adam_beta1, self.args.adam_beta2),
                    eps=self.args.adam_epsilon,
                    weight_decay=self.args.weight_decay,
                )
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        if self.recipe is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, self.recipe.factor(num_training_steps))
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.recipe is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        if model.training:
            inputs, labels = self.recipe.mix(inputs, labels)
        logits = self.recipe.outputs(model, inputs)
        loss = self.recipe.loss(logits, labels)
        return (loss, {"loss": loss, "logits": logits}) if return_outputs else loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self.average.in_model() if self.average is not None and self.average.has_begun else nullcontext():
            found: dict[str, float] = super().evaluate(*args, **kwargs)
        return found

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; with several processes, running statistics and loss are those of one process, too."""
        if self.args.world_size == 1:
            return super().evaluation_loop(*args, **kwargs)
        for buffer in saved_buffers(unwrapped(self.model)).values():
            dist.broadcast(buffer, src=0)  # as DistributedDataParallel does before the next step
        output = super().evaluation_loop(*args, **kwargs)
        if self.recipe is not None and output.predictions is not None and output.label_ids is not None:
            # transformers averages over batches, which count the samples that fill up the last one.
            logits, labels = torch.as_tensor(output.predictions), torch.as_tensor(output.label_ids)
            name = next(name for name in output.metrics if name.endswith("_loss"))
            output.metrics[name] = float(self.recipe.loss(logits, labels))
        return output

    # --- Checkpoints

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self._is_checkpoint and self.args.should_save and self.average is not None and self.average.has_begun:
            self.average.save(Path(self.args.output_dir if output_dir is None else output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.average is not None:
            self.average.load(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.average is not None:
            self.average.load(Path(self.state.best_model_checkpoint))


def _not_of_times(record: logging.LogRecord) -> bool:
    """Leaves out that checkpoints are sorted by number: those of small models are written in the same second."""
    return "mtime may not be reliable" not in record.getMessage()


class _OwnRandomness(TrainerCallback):
    """Gives each process random numbers of its own, for dropout and mixing; the order of the data has its own seed."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.process_index > 0:
            transformers.set_seed(args.seed + args.process_index)


class Epochs(TrainerCallback):
    """Tells the training set which epoch it is, for its augmentation."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        dataset: Any = getattr(kwargs.get("train_dataloader"), "dataset", None)
        if hasattr(dataset, "epoch"):
            dataset.epoch = state.global_step // max(round(state.max_steps / state.num_train_epochs), 1)


class StopCleanly(TrainerCallback):
    """On Ctrl-C or SIGTERM, finishes the step, saves a checkpoint and stops; a second one stops at once.

    With several processes all stop after the same step, whichever got the signal, and a second one is ignored, because
    launchers pass on what the terminal has already sent.

    Attributes:
        stopped: whether training was stopped so.
    """

    def __init__(self, anywhere: Callable[[bool], bool] | None = None) -> None:
        """
        Args:
            anywhere: says on every rank whether its argument is true on any; None: there is one process.
        """
        self.stopped = False
        self._asked = False
        self._anywhere = anywhere
        self._before: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            self._before = {each: signal.signal(each, self._ask) for each in (signal.SIGINT, signal.SIGTERM)}

    def _ask(self, number: int, frame: Any) -> None:
        if self._asked and self._anywhere is None:
            raise KeyboardInterrupt
        self._asked = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self.stopped = self._asked if self._anywhere is None else self._anywhere(self._asked)
        # At the end of an epoch, its evaluation comes first.
        if self.stopped and state.global_step % max(round(state.max_steps / state.num_train_epochs), 1):
            control.should_save = control.should_training_stop = True
            control.should_log = False
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self.stopped:
            whole = not state.global_step % max(round(state.max_steps / state.num_train_epochs), 1)
            control.should_training_stop = True
            control.should_save = whole
            control.should_evaluate &= whole
            control.should_log &= whole
        return control

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.release()

    def release(self) -> None:
        """Gives the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
