"""CPU benchmarks of optimizer steps."""
