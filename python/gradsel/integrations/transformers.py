"""gradsel in scripts that use transformers' Trainer: optimizer, checkpoints, and folders that others read."""

from gradsel.delta.pretrained import from_pretrained, save_pretrained
from gradsel.integrations.transformers_optimizer import masked_adamw
from gradsel.training.saving import SparseCheckpoints
from gradsel.training.trainer import StopCleanly

__all__ = ["SparseCheckpoints", "StopCleanly", "from_pretrained", "masked_adamw", "save_pretrained"]
