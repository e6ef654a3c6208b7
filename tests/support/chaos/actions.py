"""What users do with an attached model: each action takes a World, checks its effect, and raises nothing but Skipped.

What is refused is refused in the documented words, which the action checks.
"""

from __future__ import annotations

from tests.support.chaos import copying, modules, training, writing

ACTIONS = [
    training.train, training.train, training.train_checkpointed, training.train_compiled, training.train_in_autocast,
    training.forward_only, training.zero_grad, training.functional, training.freeze_values, training.sync,
    writing.write_values, writing.write_values, writing.write_weights, writing.write_both, writing.assign_parameters,
    copying.cast, copying.cast, copying.move, copying.copied, copying.copied, copying.averaged, copying.load_own,
    copying.load_in_another, copying.load_plain, copying.load_other_values, copying.delta_round_trip,
    modules.tie, modules.wrap, modules.hooked, modules.pruned, modules.reparametrised, modules.resized,
    modules.refused, modules.detach, modules.detach,
]  # fmt: skip
