"""The sum at the end of a residual branch."""

import jax.numpy as jnp
import numpy as np

from vssd_jax.kernels.add_branch import add_branch


def test_each_sample_has_its_scale():
    x, branch = jnp.ones((3, 2, 2)), jnp.full((3, 2, 2), 3.0)
    y = add_branch(x, branch, jnp.asarray([0.0, 1.0, 2.0]))
    np.testing.assert_array_equal(y[:, 0, 0], [1, 4, 7])
    np.testing.assert_array_equal(add_branch(x, branch, None), jnp.full((3, 2, 2), 4.0))


def test_sixteen_bits_are_added_in_float32():
    x = jnp.full((1, 1), 256, jnp.bfloat16)
    y = add_branch(x, jnp.full((1, 1), 1.0, jnp.bfloat16), jnp.asarray([1.51]))
    assert y.dtype == jnp.bfloat16
    assert y[0, 0] == 258
