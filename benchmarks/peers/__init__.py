"""Comparison with other ways to run fewer layers or fewer steps, on the same model and prompts."""
