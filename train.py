"""Trains a model: `vssd-train` of an installed package."""

from vssd_jax.commands.train import run

if __name__ == "__main__":
    run()
