"""Everything about speed on one GPU, within ten minutes: see __main__.py."""
