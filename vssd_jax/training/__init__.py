"""State, optimizer, loop, checkpoints and metrics: one loop for every task."""
