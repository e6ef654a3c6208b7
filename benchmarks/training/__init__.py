"""Training steps of whole models with every method."""
