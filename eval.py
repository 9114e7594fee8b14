"""Evaluates weights: `vssd-eval` of an installed package."""

from vssd_jax.commands.eval import run

if __name__ == "__main__":
    run()
