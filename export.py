"""Exports weights: `vssd-export` of an installed package."""

from vssd_jax.commands.export import run

if __name__ == "__main__":
    run()
