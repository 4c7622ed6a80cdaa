"""Measured time and memory of pruned models: ``dop-bench`` and latency tables. Needs torch and transformers only."""
