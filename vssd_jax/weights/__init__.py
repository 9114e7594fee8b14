"""Weights in and out: PyTorch's names (names.py), model state (state.py), folders (folder.py)."""
