"""CPU benchmarks of single kernels."""
