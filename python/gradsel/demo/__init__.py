"""A worked example over the public API: a small ViT on digits, adapted by six methods."""
