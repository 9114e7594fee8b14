"""The checker of annotations while the tests run; see conftest.py."""

import inspect

from beartype import BeartypeConf, beartype

# As type checkers do, take an int where a float is wanted.
_check = beartype(conf=BeartypeConf(is_pep484_tower=True))
_checked = {}


def check(function):
    """`function` with its arguments checked.

    jaxtyping passes functions that have nothing but a signature. Those of a function in a function
    come again at every call of the outer one (initializers: twice for each layer of a model), and
    to decorate one takes a millisecond.
    """
    if "<locals>" not in function.__qualname__:
        return _check(function)
    key = function.__module__, function.__qualname__, inspect.signature(function)
    try:
        known = _checked.get(key)
    except TypeError:  # a default value or an annotation that cannot be hashed
        return _check(function)
    if known is None:
        known = _checked[key] = _check(function)
    return known
