"""Implementations from the operations' tables, for tests."""

import dataclasses

import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from vssd_jax.kernels import dispatch


def pallas(operation):
    """The module of the operation's Pallas kernels; on a CPU they run in the interpreter.

    Skips the test if JAX has no Triton backend of Pallas.
    """
    pytest.importorskip("jax.experimental.pallas.triton", exc_type=ImportError)
    return operation.module("pallas")


def register_interpreted(operation):
    """Allows `implementation="interpreted"` on a CPU: the row "pallas" in the interpreter."""
    row = dataclasses.replace(
        operation.table["pallas"], runs_on=dispatch.anywhere, automatic=False
    )
    operation.register("interpreted", row)


def on_a_gpu():
    """A context in which the dispatch takes a GPU for the device. (Nothing can run in it.)"""
    device = AbstractDevice("NVIDIA H200", 1, "cuda")
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))
