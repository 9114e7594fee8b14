"""Predicts for pictures: `vssd-predict` of an installed package."""

from vssd_jax.commands.predict import run

if __name__ == "__main__":
    run()
