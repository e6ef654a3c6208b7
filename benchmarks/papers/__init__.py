"""What the papers' experiments cost on this machine."""
