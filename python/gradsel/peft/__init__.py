"""PEFT's sparse adapters with our forward and backward."""

from gradsel.peft.accelerating import accelerate

__all__ = ["accelerate"]
