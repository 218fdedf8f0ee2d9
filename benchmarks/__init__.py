"""Benchmarks of the plugin. Run them as modules from the root of the repository: `python -m benchmarks.run`."""
