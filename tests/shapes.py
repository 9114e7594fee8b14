"""The checker of annotations while the tests run; see conftest.py."""

from beartype import BeartypeConf, beartype

# As type checkers do, take an int where a float is wanted.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
