"""PyTorch checkpoints through the command: outputs and gradients as in PyTorch."""

import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import vssd_jax
from tests.golden import synthetic
from tests.golden.inventories import load_inventory
from torch_reference import create_model as torch_model
from vssd_jax.models import torch_names, vssd
from vssd_jax.weights.convert import convert
from vssd_jax.weights.load import load
from vssd_jax.weights.torch_file import write_torch_file

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def golden_images(shape, salt=0):
    return synthetic.synthetic_images(shape, salt).transpose(0, 2, 3, 1)


@pytest.mark.parametrize(
    ("name", "size", "rectangle"),
    [
        ("nano", (64, 64), (96, 160)),
        # These take up to a minute each: `pytest -m slow`.
        *(
            pytest.param(name, (224, 224), (256, 320), marks=pytest.mark.slow)
            for name in ("micro", "tiny", "small", "base")
        ),
    ],
)
def test_golden_logits_through_the_conversion(name, size, rectangle, tmp_path):
    inventory = load_inventory(f"classification_{name}")
    write_torch_file(tmp_path / "a.pth", synthetic.synthetic_state_dict(inventory))
    convert(tmp_path / "a.pth", tmp_path / "w")
    model = vssd_jax.create_model(f"vssd_{name}", weights=tmp_path / "w")
    graph, arrays = nnx.split(model)
    forward = jax.jit(lambda arrays, images: nnx.merge(graph, arrays)(images))
    golden = np.load(GOLDEN / f"classification_{name}.npz")
    cases = [(golden["logits_f64"], golden_images((2, 3, *size)))]
    if "logits_rect" in golden:  # base has none
        cases.append((golden["logits_rect"], golden_images((1, 3, *rectangle), salt=1)))
    for expected, images in cases:
        np.testing.assert_allclose(forward(arrays, images), expected, rtol=0, atol=2e-5)


def save_as_the_authors_do(path, seed: int):
    """A checkpoint of their trainer, with random weights everywhere; returns the EMA's model."""
    torch.manual_seed(seed)
    models = []
    for _ in range(2):
        model = torch_model("vssd_nano").double()
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if name.endswith("running_var"):
                    tensor.uniform_(0.5, 1.5)
                elif tensor.is_floating_point() and not name.endswith(("A_log", "dt_bias")):
                    tensor += 0.1 * torch.randn_like(tensor)
        models.append(model)
    optimizer = torch.optim.AdamW(models[0].parameters())
    models[0](torch.randn(2, 3, 32, 32, dtype=torch.float64)).sum().backward()
    optimizer.step()
    torch.save(
        {
            "model": models[0].state_dict(),
            "model_ema": models[1].state_dict(),
            "optimizer": optimizer.state_dict(),
            "epoch": 3,
            "max_accuracy": np.float64(81.5),
            "config": types.SimpleNamespace(MODEL="vssd"),
        },
        path,
    )
    return models[1].eval()


def test_outputs_and_gradients_are_pytorchs(tmp_path):
    def run(graph, params, statistics, images, cotangent):
        def loss(params):
            model = nnx.merge(graph, params, statistics)
            logits = model(images)
            return (logits * cotangent).sum(), (logits, model.feature_maps(images))

        return jax.grad(loss, has_aux=True)(params)

    run = jax.jit(run, static_argnums=0)
    for seed in range(3):
        reference = save_as_the_authors_do(tmp_path / f"{seed}.pth", seed)
        convert(tmp_path / f"{seed}.pth", tmp_path / f"{seed}")
        images = torch.randn(2, 3, 40, 56, dtype=torch.float64)
        cotangent = torch.randn(2, 10, dtype=torch.float64)
        maps, logits = reference.stages(images)[1:], reference(images)
        (logits * cotangent).sum().backward()
        gradients = {name: p.grad.numpy() for name, p in reference.named_parameters()}
        expected, _, unknown = torch_names.from_torch(vssd.TORCH_TABLE, gradients)
        assert unknown == []

        with jax.enable_x64(True):
            model = vssd_jax.create_model(
                "vssd_nano", weights=tmp_path / f"{seed}", dtype=jnp.float64
            )
            graph, params, statistics = nnx.split(model, nnx.Param, nnx.BatchStat)
            inputs = images.permute(0, 2, 3, 1).numpy(), cotangent.numpy()
            grads, (got, got_maps) = run(graph, params, statistics, *inputs)
            grads = {
                ".".join(map(str, path)): np.asarray(leaf[...])
                for path, leaf in nnx.to_flat_state(grads)
            }
        assert_close(got, logits.detach().numpy())
        for ours, theirs in zip(got_maps, maps, strict=True):
            assert_close(ours, theirs.detach().numpy())
        assert grads.keys() == expected.keys()
        for name, gradient in grads.items():
            assert_close(gradient, expected[name], name)


def assert_close(got, expected, name=""):
    error = np.linalg.norm(np.asarray(got) - expected) / np.linalg.norm(expected)
    assert error < 1e-8, f"{name}: {error}"


def test_model_or_ema(tmp_path):
    save_as_the_authors_do(tmp_path / "a.pth", 0)
    saved = torch.load(tmp_path / "a.pth", weights_only=False)
    for which, entry in (("model", "model"), ("ema", "model_ema"), (None, "model_ema")):
        loaded = load(tmp_path / "a.pth", which=which)
        np.testing.assert_array_equal(
            loaded.params["head.kernel"], saved[entry]["head.weight"].numpy().T
        )
