"""Named arrays in vectors, and the optimizer on them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vssd_jax.config import base_config
from vssd_jax.training.optimizer import make_optimizer
from vssd_jax.training.packed import Packed, pack, pack_all, unpack, unpack_all

ARRAYS = {
    "b.kernel": jnp.arange(6.0).reshape(2, 3),
    "a": jnp.float32(7),
    "c.half": jnp.ones((4,), jnp.bfloat16),
    "empty": jnp.zeros((0, 3)),
}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)


def test_a_vector_for_each_dtype_and_back():
    packed = pack(ARRAYS)
    assert [(v.dtype.name, v.size) for v in packed.vectors] == [("bfloat16", 4), ("float32", 7)]
    assert_equal(unpack(packed), ARRAYS)
    doubled = jax.tree.map(lambda vector: 2 * vector, packed)
    assert_equal(unpack(doubled), {name: 2 * value for name, value in ARRAYS.items()})


def test_a_tree_with_packed_parts_and_back():
    tree = {"count": jnp.int32(3), "moments": (pack(ARRAYS), optax.EmptyState())}
    named = unpack_all(tree)
    assert_equal(named["moments"][0], ARRAYS)
    back = pack_all(named, tree)
    assert isinstance(back["moments"][0], Packed)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, back, tree)


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_the_optimizer_does_as_optax_does_and_keeps_the_names(clip):
    config = base_config()
    config.update(weight_decay=0.1, clip_grad_norm=clip, betas=(0.9, 0.99), epsilon=1e-8)
    params = {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3)}
    mask = {"kernel": True, "bias": False}
    packed = make_optimizer(config, lambda step: 0.1, mask, packed=True)
    adamw = optax.adamw(0.1, b1=0.9, b2=0.99, weight_decay=0.1, mask=mask)
    plain = optax.chain(optax.clip_by_global_norm(clip), adamw) if clip else adamw
    state, expected_state = packed.init(params), plain.init(params)
    found = expected = params
    for step in range(3):
        gradient = jax.tree.map(lambda x: jnp.sin(x + step), params)  # noqa: B023
        updates, state = packed.update(gradient, state, found)
        found = optax.apply_updates(found, updates)
        updates, expected_state = plain.update(gradient, expected_state, expected)
        expected = optax.apply_updates(expected, updates)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6)

    def names(state):
        leaves = jax.tree_util.tree_leaves_with_path(unpack_all(state))
        return {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves}

    # A checkpoint of optax's own AdamW can be resumed.
    moments = {name for name in names(expected_state) if "mu" in name or "nu" in name}
    assert len(moments) == 4
    assert moments <= names(state)
