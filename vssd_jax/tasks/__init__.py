"""What the training loop needs to know of each task."""
