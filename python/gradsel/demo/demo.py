"""``gradsel demo``: ``gradsel finetune`` from beginning to end, in two minutes on a CPU, without a download.

A small vision transformer learns the handwritten digits 0 to 4 and is saved, as timm saves its models. Then the command
that anybody would type fine-tunes it on 5 to 9.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gradsel.demo.digits import NEW, OLD, write_folder
from gradsel.training.config import CONFIG, Config
from gradsel.training.folder import RESULTS
from gradsel.training.run import finetune, resume

#: The model: timm's vision transformer, in small.
ARCHITECTURE = "vit_tiny_patch16_224"
SIZES: Mapping[str, Any] = {"img_size": 8, "patch_size": 2, "embed_dim": 64, "depth": 4, "num_heads": 4}
DATA, MODEL = "digits-5-9", "vit-digits-0-4"
PRETRAIN_EPOCHS, EPOCHS = 40, 30
#: Images of each class: for training, for choosing the epoch, and the others for testing.
SPLIT = {"train": 100, "val": 20, "test": None}


def prepare(folder: Path, quiet: bool = False, epochs: int = PRETRAIN_EPOCHS) -> tuple[Path, Path]:
    """Makes what the demo begins with, as far as it is not there: the images to fine-tune on, and a pre-trained model.

    Returns:
        Folders: ``folder/digits-5-9`` and ``folder/vit-digits-0-4``.
    """
    data, model = folder / DATA, folder / MODEL
    if not data.exists():
        _as_a_whole(data, lambda new: write_folder(new, NEW, SPLIT))
    if not model.exists():
        _as_a_whole(model, lambda new: pretrain(new, folder / "pretraining", quiet, epochs))
    return data, model


def pretrain(model: Path, run: Path, quiet: bool = False, epochs: int = PRETRAIN_EPOCHS) -> None:
    """Trains the model on the old classes, in the folder ``run``, and saves it as timm does."""
    import timm
    from safetensors.torch import load_file
    from timm.models import save_for_hf

    data = run.with_name("pretraining-digits")
    if not data.exists():
        _as_a_whole(data, lambda new: write_folder(new, OLD, {"train": 150, "test": None}))
    if (run / CONFIG).exists() and not (run / RESULTS).exists():
        resume(run, quiet=quiet)
    elif not (run / RESULTS).exists():
        settings = {
            "data": {"path": str(data), "augmentation": "none"},
            "model": {"name": ARCHITECTURE, "weights": "none", "options": dict(SIZES)},
            "method": {"name": "full"},
            "recipe": {"epochs": epochs, "learning_rate": 1e-3},
            "output": {"folder": str(run), "report": False, "keep": 1},
            "device": "cpu",
        }
        finetune(Config.from_dict(settings), quiet=quiet)
    network = timm.create_model(ARCHITECTURE, num_classes=len(OLD), **SIZES)
    network.load_state_dict(load_file(run / "weights.safetensors"))
    save_for_hf(network, model, safe_serialization=True, model_args=dict(SIZES))


def command(data: Path, model: Path, output: Path, epochs: int = EPOCHS) -> list[str]:
    """What one would type, without ``gradsel``."""
    return [
        "finetune", "--data", str(data), "--model", str(model), "--method", "gps", "--k", "1", "--epochs", str(epochs),
        "--learning-rate", "3e-2", "--augmentation", "none", "--device", "cpu", "--output", str(output),
    ]  # fmt: skip


def typed(words: list[str]) -> str:
    """A command of ``gradsel`` as it is typed."""
    return f"gradsel {shlex.join(words)}"


def new_output(folder: Path) -> Path:
    """A folder for a run that does not exist yet: ``folder/run``, ``folder/run-2``, ..."""
    output, number = folder / "run", 1
    while output.exists():
        number += 1
        output = folder / f"run-{number}"
    return output


@contextmanager
def one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from a second core, and rounding must not depend on the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _as_a_whole(path: Path, write: Any) -> None:
    """Writes a folder that is there completely or not at all."""
    new = path.with_name(path.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.parent.mkdir(parents=True, exist_ok=True)
    write(new)
    new.rename(path)
