"""Datasets, transforms and the input pipeline. Imports no jax: Grain's workers load this."""
