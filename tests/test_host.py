"""The compiler's options for a CPU."""

import jax

from vssd_jax.host import compiler_options


def test_the_installed_compiler_knows_the_options():
    assert compiler_options()


def test_a_compiler_that_does_not_know_them(monkeypatch):
    jit = jax.jit
    unknown = {"xla_option_of_another_version": "1"}
    monkeypatch.setattr(jax, "jit", lambda f, compiler_options: jit(f, compiler_options=unknown))
    assert compiler_options.__wrapped__() == {}
