"""Experiments: many runs of ``gradsel finetune`` under equal conditions, and what came of them in one file."""

from gradsel.experiments.comparing import Comparison, compare

__all__ = ["Comparison", "compare"]
