"""Tables that answer a question about operation pruning, measured row by row and resumable."""
