"""A module's test is found by its path: vssd_jax/models/vssd.py has tests/models/test_vssd.py.

Packages, so that files of different folders may have one name.
"""
