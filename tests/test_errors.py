"""Hints in error messages."""

import pytest

from vssd_jax.errors import UserError, did_you_mean


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("cosin", "; did you mean 'cosine'?"),
        ("exponential", "; choose from cosine, linear, steps"),
        ("", "; choose from cosine, linear, steps"),
    ],
)
def test_the_nearest_word_or_all_of_them(word, hint):
    assert did_you_mean(word, iter(("cosine", "linear", "steps"))) == hint


def test_a_user_error_is_a_value_error():
    assert issubclass(UserError, ValueError)
