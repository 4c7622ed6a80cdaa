"""What knows nothing of operations, models or searches."""
