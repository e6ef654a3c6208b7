"""Benchmarks of selecting weights, and of the deltas that training them leaves."""
