"""Task scores of full and pruned models."""
