"""One kernel for many arrays, in the interpreter, against the function on each of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels.test_tables import run_on_cpus

# Tails, whole blocks, a scalar and single elements; more arrays than a launch takes.
SHAPES = [(5, 7), (), (1,), (16,), (2, 3, 4), (33,), (3,), (48,), (1, 1)]
CONSTANTS = [(1.0, 0.5), (0.0, 0.5), (0.0, 0.5), (1.0, 1.0), (1.0, 0.25), *[(0.0, 1.0)] * 4]


@pytest.fixture
def module(monkeypatch):
    pytest.importorskip("jax.experimental.pallas.triton", exc_type=ImportError)
    from vssd_jax.kernels import multi_tensor

    monkeypatch.setattr(multi_tensor, "BLOCK", 16)
    return multi_tensor


def new_values(part, x, y, decays, rate, factor):
    return x + rate * (factor * part + decays * x), y * jnp.where(factor > 2, x, part)


def inputs(dtype=jnp.float64, shapes=SHAPES):
    rng = np.random.default_rng(0)
    arrays = [[jnp.asarray(rng.standard_normal(s), dtype) for s in shapes] for _ in range(2)]
    return jnp.asarray(rng.standard_normal(sum(x.size for x in arrays[0])), dtype), arrays


def expected(vector, arrays, factor, shapes=SHAPES, all_constants=CONSTANTS):
    ends = np.cumsum([x.size for x in arrays[0]])
    parts = [part.reshape(s) for part, s in zip(jnp.split(vector, ends[:-1]), shapes, strict=True)]
    found = [
        new_values(part, x, y, *constants, factor)
        for part, x, y, constants in zip(parts, *arrays, all_constants, strict=True)
    ]
    return [list(values) for values in zip(*found, strict=True)]


@pytest.mark.parametrize("most", [1, 2, 5, 9])
def test_each_array_gets_its_part_of_the_vector(most, module, monkeypatch, x64, poisoned_tails):
    monkeypatch.setattr(module, "ARRAYS", most)
    vector, arrays = inputs()
    factor = jnp.float64(1.5)
    found = module.multi_tensor(new_values, vector, arrays, CONSTANTS, [factor])
    wanted = expected(vector, arrays, factor)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-14, atol=1e-14)


SHARDED = """
import jax
from jax.sharding import AxisType
from tests.kernels.test_multi_tensor import CONSTANTS, expected, inputs, new_values
import numpy as np, jax.numpy as jnp
from vssd_jax.kernels.multi_tensor import multi_tensor

vector, arrays = inputs(jnp.float32)
devices = jax.make_mesh((2, 4), ("data", "other"), axis_types=(AxisType.Auto,) * 2)
with jax.set_mesh(devices):
    f = jax.jit(lambda *a: multi_tensor(new_values, *a[:2], CONSTANTS, [a[2]]))
    compiled = f.lower(vector, arrays, jnp.float32(3)).compile()
    found = compiled(vector, arrays, jnp.float32(3))
assert "all-" not in compiled.as_text(), "something is exchanged"
for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected(vector, arrays, 3)), strict=True):
    assert a.sharding.is_fully_replicated
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
print("done")
"""


def test_each_device_computes_all():
    pytest.importorskip("jax.experimental.pallas.triton", exc_type=ImportError)
    assert "done" in run_on_cpus(SHARDED, devices=8)


@pytest.mark.gpu
def test_gpu():
    """Several launches, blocks that are not whole, and in place."""
    pytest.importorskip("jax.experimental.pallas.triton", exc_type=ImportError)
    from vssd_jax.kernels.multi_tensor import multi_tensor

    shapes = [*SHAPES, (1024,), (3, 1025), (300, 700)] * 9
    constants = [(float(i % 2), 1 / (1 + i)) for i in range(len(shapes))]
    vector, arrays = inputs(jnp.float32, shapes)
    wanted = expected(vector, arrays, 3, shapes, constants)
    run = jax.jit(
        lambda *a: multi_tensor(new_values, *a, constants, [jnp.float32(3)]), donate_argnums=1
    )
    for a, b in zip(jax.tree.leaves(run(vector, arrays)), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
