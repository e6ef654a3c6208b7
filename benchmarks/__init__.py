"""Everything that measures speed and memory; run from the root of the repository.

- ``harness``: one clock, one results format, one table of colours; shared by all rooms
- ``kernels``, ``optimizer``, ``selection``: CPU benchmarks of one operation each, run by ``pytest benchmarks``;
  how near the optimizer's step is to its goals, ``python -m benchmarks.optimizer.targets``
- ``training``: whole training steps of every method, ``python -m benchmarks.training.train_step``; what the Trainer
  costs, ``python -m benchmarks.training.overhead``; PEFT's layers with our forward and backward,
  ``python -m benchmarks.training.peft_layers``
- ``gpu``: all of it on one GPU within ten minutes, ``python -m benchmarks.gpu``
- ``results``: what was measured, and the pictures drawn from it
"""

from importlib.util import find_spec

if find_spec("gradsel") is None or find_spec("gradsel_kernels") is None:
    raise ModuleNotFoundError(
        "gradsel or gradsel_kernels is not importable. Run from the root of the repository with PYTHONPATH=.:python, "
        "or install the package first (pip install --editable .)."
    )
