"""Static pruning, the baseline to beat."""

from vllm_buddy.baselines.pruned_checkpoint import save_pruned_checkpoint

__all__ = ["save_pruned_checkpoint"]
