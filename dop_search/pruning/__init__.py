"""Physical operation pruning of Hugging Face models. Needs torch and transformers only."""

from dop_search.pruning.context import PruneHandle, prune_, pruned

__all__ = ["PruneHandle", "prune_", "pruned"]
