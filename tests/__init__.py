"""The test of a module is found by its path: that of vssd_jax/models/vssd.py is models/test_vssd.py.

Packages, so that files of different folders may have one name.
"""
