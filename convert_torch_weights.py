"""Converts weights: `vssd-convert` of an installed package."""

from vssd_jax.commands.convert import run

if __name__ == "__main__":
    run()
