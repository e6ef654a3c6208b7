"""From a pre-trained model and a data set to a trained, evaluated result; each part can be used alone.

Names are imported when they are first used, so that the command line can show its help without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gradsel.errors import RunError
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
    from gradsel.training.result import Result
    from gradsel.training.run import finetune, resume
    from gradsel.training.segmentation.predicting import predict_masks
    from gradsel.training.trainer import Trainer
    from gradsel.training.using import evaluate, predict

_HOME = {
    "Result": "gradsel.training.result",
    "Trainer": "gradsel.training.trainer",
    "evaluate": "gradsel.training.using",
    "finetune": "gradsel.training.run",
    "predict": "gradsel.training.using",
    "predict_masks": "gradsel.training.segmentation.predicting",
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
    "RunError",
    "Trainer",
    "evaluate",
    "finetune",
    "predict",
    "predict_masks",
    "read_config",
    "resume",
]


if not TYPE_CHECKING:  # or every name would have a type, misspelt ones too

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
