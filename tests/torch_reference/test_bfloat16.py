"""What bfloat16 costs here and in PyTorch."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.golden.inventories import load_inventory
from tests.golden.synthetic import synthetic_images, synthetic_state_dict
from tests.golden_model import golden_model, run
from torch_reference import create_model
from vssd_jax.models.vssd import VSSDConfig


def error(logits, exact):
    """Root mean square, relative."""
    logits, exact = np.asarray(logits, np.float64), np.asarray(exact, np.float64)
    return np.sqrt(np.square(logits - exact).mean() / np.square(exact).mean())


@pytest.mark.slow
@torch.no_grad()
def test_logits_in_bfloat16_are_no_further_from_float32_than_pytorchs():
    """VSSD-Tiny, over five sets of weights: a single set says little of rounding."""
    inventory = load_inventory("classification_tiny")
    options = {"config": VSSDConfig.tiny(), "inventory": "classification_tiny"}
    ours, theirs = [], []
    for salt in range(5):
        images = synthetic_images((4, 3, 224, 224), salt)
        reference = create_model("vssd_tiny").eval()
        state = synthetic_state_dict(inventory, salt)
        reference.load_state_dict({name: torch.from_numpy(v) for name, v in state.items()})
        exact = reference(torch.from_numpy(images))
        with torch.autocast("cpu", torch.bfloat16):
            theirs.append(error(reference(torch.from_numpy(images)).float(), exact))
        for dtype in (jnp.float32, jnp.bfloat16):
            model = golden_model(num_classes=1000, dtype=dtype, salt=salt, **options)
            logits = run(model, images.transpose(0, 2, 3, 1))
            if dtype == jnp.float32:
                assert error(logits, exact) < 1e-5
            else:
                ours.append(error(logits, exact))
    print("relative errors: here", np.round(ours, 4), "PyTorch", np.round(theirs, 4))
    assert np.mean(ours) <= np.mean(theirs), (ours, theirs)
