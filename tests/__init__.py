"""A package, so that test_vssd.py may mirror both the model's file and the PyTorch reference's."""
