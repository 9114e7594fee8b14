"""Reading and writing weights: PyTorch's files, weights folders, the checkpoints of runs."""
