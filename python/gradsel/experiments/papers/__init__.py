"""The experiments of both papers by name, and what runs them."""

from gradsel.experiments.papers.registry import EXPERIMENTS, experiment
from gradsel.experiments.papers.running import run

__all__ = ["EXPERIMENTS", "experiment", "run"]
