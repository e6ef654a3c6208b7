"""From a pre-trained model and a data set to a trained, evaluated result; each part can be used alone.

Names are imported when they are first used, so that the command line can show its help without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gradsel.training.config import (
    Config,
    DataConfig,
    MethodConfig,
    ModelConfig,
    OutputConfig,
    RecipeConfig,
    read_config,
)

if TYPE_CHECKING:
    from gradsel.training.run import Result, evaluate, finetune, predict, resume
    from gradsel.training.trainer import Trainer

_HOME = {
    "Result": "gradsel.training.run",
    "Trainer": "gradsel.training.trainer",
    "evaluate": "gradsel.training.run",
    "finetune": "gradsel.training.run",
    "predict": "gradsel.training.run",
    "resume": "gradsel.training.run",
}

__all__ = [
    "Config",
    "DataConfig",
    "MethodConfig",
    "ModelConfig",
    "OutputConfig",
    "RecipeConfig",
    "Result",
    "Trainer",
    "evaluate",
    "finetune",
    "predict",
    "read_config",
    "resume",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(_HOME[name]), name)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package.startswith("gradsel"):
            raise
        raise ModuleNotFoundError(
            f"fine-tuning needs {package}, which is not installed: pip install 'gradsel-kernels[finetune]'",
            name=error.name,
        ) from error
