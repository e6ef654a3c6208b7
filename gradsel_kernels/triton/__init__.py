"""Triton kernels, one file per operation: private kernels, their heuristics, a launcher. Shared parts: ``common``."""
