"""Parameters in and out of a model, by name and strictly."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vssd_jax.errors import UserError
from vssd_jax.weights.state import check, get_state, set_state, shapes


class Toy(nnx.Module):
    def __init__(self):
        self.kernel = nnx.Param(jnp.zeros((2, 3)))
        self.layers = nnx.List([nnx.BatchStat(jnp.zeros(3))])


GOOD = {"kernel": np.ones((2, 3)), "layers.0": np.full(3, 2.0)}


def test_there_and_back():
    model = Toy()
    assert shapes(model) == {"kernel": (2, 3), "layers.0": (3,)}
    set_state(model, GOOD)
    found = get_state(model)
    assert found.keys() == GOOD.keys()
    for name, value in GOOD.items():
        np.testing.assert_array_equal(found[name], value)
        assert found[name].dtype == np.float32  # the model's


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kernel": GOOD["kernel"]}, "1 missing: layers.0$"),
        (GOOD | {"more": np.ones(1)}, "1 unexpected: more$"),
        (GOOD | {"kernel": np.ones((3, 2))}, r"1 of another shape: kernel \(3, 2\) for \(2, 3\)$"),
        ({"kernel": np.ones(2), "b": 0}, "1 missing: layers.0; 1 unexpected: b; 1 of another"),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(values, message):
    model = Toy()
    with pytest.raises(UserError, match=message):
        set_state(model, values)
    assert all((value == 0).all() for value in get_state(model).values())


def test_only_the_first_names_are_listed():
    with pytest.raises(UserError, match=r"20 missing: x00, .*, x07, \.\.\.$"):
        check({f"x{index:02}": () for index in range(20)}, {})


@pytest.mark.parametrize("values", [{}, {"layers.0": np.ones(4)}])
def test_fresh_values_stay(values):
    model = Toy()
    set_state(model, {"kernel": GOOD["kernel"], **values}, fresh=["layers.0"])
    found = get_state(model)
    assert (found["kernel"] == 1).all()
    assert (found["layers.0"] == 0).all()
