"""What all benchmarks share: clock, timing, results, tables, plots and checks."""
