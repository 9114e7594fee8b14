"""JSON without NaN."""

import json

from vssd_jax.strict_json import dumps


def test_numbers_that_are_not_finite_are_null():
    value = {"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": (float("-inf"), "x")}}
    assert json.loads(dumps(value)) == {"a": None, "b": [None, 1.5], "c": {"d": [None, "x"]}}
