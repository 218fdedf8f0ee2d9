"""Stage 1: what makes an artifact. See docs/training.md."""
