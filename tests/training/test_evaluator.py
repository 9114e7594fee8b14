"""Evaluation of a task's model, with a task that only counts."""

import types

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vssd_jax.errors import UserError
from vssd_jax.models.split import SplitModel
from vssd_jax.training.evaluator import Evaluator
from vssd_jax.training.sharding import make_mesh


class Line(nnx.Module):
    def __init__(self, rngs):
        self.w = nnx.Param(jnp.ones(()))
        self.deterministic = False


class Counting:
    """Sums w x over the batches."""

    def __init__(self, batches, eval_batch_size=2):
        self.batches = batches
        self.config = types.SimpleNamespace(eval_batch_size=eval_batch_size, dtype="float32")

    def eval_batches(self):
        return iter(self.batches)

    def eval_step(self, model, batch):
        assert model.deterministic
        return {"y": model.w[...] * batch["x"]}

    def summarize(self, outputs):
        outputs = [output["y"] for output in outputs]
        assert all(isinstance(output, np.ndarray) for output in outputs)
        return {"val/sum": float(sum(output.sum() for output in outputs)), "n": len(outputs)}


@pytest.fixture
def mesh():
    return make_mesh({"data": -1, "fsdp": 1})


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_every_batch_counts_once(mesh, count):
    batches = [{"x": np.float32([10**index, 0])} for index in range(count)]
    evaluate = Evaluator(Counting(batches), SplitModel(Line), mesh)
    for w in (3.0, 4.0):
        results = evaluate({"w": jnp.float32(w)})
        assert results == {"val/sum": w * sum(10**index for index in range(count)), "n": count}


def test_batches_of_a_shape_share_a_program(mesh):
    traced = []

    class Traced(Counting):
        def eval_step(self, model, batch):
            traced.append(batch["x"].shape)
            return super().eval_step(model, batch)

    batches = [{"x": np.ones(size, np.float32)} for size in (2, 4, 2, 4)]
    evaluate = Evaluator(Traced(batches), SplitModel(Line), mesh)
    for _ in range(2):
        evaluate({"w": jnp.float32(1)})
    assert traced == [(2,), (4,)]


def test_a_batch_that_cannot_be_divided(mesh):
    with pytest.raises(UserError, match=r"config.eval_batch_size=0 does not divide"):
        Evaluator(Counting([], eval_batch_size=0), SplitModel(Line), mesh)
