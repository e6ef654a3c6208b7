"""A worked example of the public API: a small ViT on digits, adapted by six methods."""
