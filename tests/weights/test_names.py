import numpy as np
import pytest

from tests.golden import synthetic
from tests.golden.inventories import INVENTORIES, load_inventory
from vssd_jax.weights import names


def table_of(inventory: str):
    families = {"mask": names.MASK_RCNN, "upernet": names.UPERNET}
    return families.get(inventory.split("_")[0], names.VSSD)


@pytest.mark.parametrize("inventory", INVENTORIES)
def test_table_covers_the_inventory_both_ways(inventory):
    table = table_of(inventory)
    tensors = {
        name: np.broadcast_to(np.float32(0), shape)
        for name, (shape, _) in load_inventory(inventory).items()
    }
    params, ignored, unknown = names.from_torch(table, tensors)
    assert unknown == []
    assert all(name.endswith(".num_batches_tracked") for name in ignored)
    assert len(params) + len(ignored) == len(tensors)

    back = names.to_torch(table, params)
    assert back.keys() == tensors.keys() - set(ignored)
    assert all(array.shape == tensors[name].shape for name, array in back.items())


@pytest.mark.parametrize("inventory", ["classification_nano", "mask_rcnn_nano", "upernet_nano"])
def test_values_come_back(inventory):
    state = synthetic.synthetic_state_dict(load_inventory(inventory))
    params, ignored, _ = names.from_torch(table_of(inventory), state)
    back = names.to_torch(table_of(inventory), params)
    for name in state.keys() - set(ignored):
        np.testing.assert_array_equal(back[name], state[name])


def test_unknown_names():
    _, ignored, unknown = names.from_torch(
        names.VSSD, dict.fromkeys(["norm.weight", "norm.wait", "x.num_batches_tracked", "head"])
    )
    assert (ignored, unknown) == (["x.num_batches_tracked"], ["norm.wait", "head"])


def test_roi_linear_reads_channels_last_features():
    rng = np.random.default_rng(0)
    features, weight = rng.standard_normal((5, 7, 7)), rng.standard_normal((3, 5 * 7 * 7))
    kernel = names.ROI_LINEAR.here(weight)
    np.testing.assert_allclose(
        features.transpose(1, 2, 0).reshape(-1) @ kernel, weight @ features.reshape(-1)
    )
    np.testing.assert_array_equal(names.ROI_LINEAR.torch(kernel), weight)


def test_deconv_kernel_places_pixels_as_pytorch():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((4, 2, 3)), rng.standard_normal((4, 5, 2, 2))
    expected = torch.nn.functional.conv_transpose2d(
        torch.from_numpy(x)[None], torch.from_numpy(weight), stride=2
    )[0].numpy()
    kernel = names.DECONV.here(weight)
    for a in range(2):
        for b in range(2):
            got = np.einsum("chw,co->ohw", x, kernel[a, b])
            np.testing.assert_allclose(got, expected[:, a::2, b::2])
