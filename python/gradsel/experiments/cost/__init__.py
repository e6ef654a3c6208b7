"""Time and memory of training and of serving one model by every method, measured under equal conditions.

:mod:`gradsel.experiments.cost.vit` is the cost figure of GPS; the GPU benchmarks of the repository run the same code.
"""
