import numpy as np
import pytest

from tests.golden import synthetic
from tests.golden.inventories import INVENTORIES, load_inventory
from vssd_jax.models import mask_rcnn, torch_names, upernet, vssd


def table_of(inventory: str):
    families = {"mask": mask_rcnn.FAMILY.torch_table, "upernet": upernet.FAMILY.torch_table}
    return families.get(inventory.split("_")[0], vssd.TORCH_TABLE)


@pytest.mark.parametrize("inventory", INVENTORIES)
def test_table_covers_the_inventory_both_ways(inventory):
    table = table_of(inventory)
    tensors = {
        name: np.broadcast_to(np.float32(0), shape)
        for name, (shape, _) in load_inventory(inventory).items()
    }
    params, ignored, unknown = torch_names.from_torch(table, tensors)
    assert unknown == []
    assert all(name.endswith(".num_batches_tracked") for name in ignored)
    assert len(params) + len(ignored) == len(tensors)

    back = torch_names.to_torch(table, params)
    assert back.keys() == tensors.keys() - set(ignored)
    assert all(array.shape == tensors[name].shape for name, array in back.items())


@pytest.mark.parametrize("inventory", ["classification_nano", "mask_rcnn_nano", "upernet_nano"])
def test_values_come_back(inventory):
    state = synthetic.synthetic_state_dict(load_inventory(inventory))
    params, ignored, _ = torch_names.from_torch(table_of(inventory), state)
    back = torch_names.to_torch(table_of(inventory), params)
    for name in state.keys() - set(ignored):
        np.testing.assert_array_equal(back[name], state[name])


def test_unknown_names():
    _, ignored, unknown = torch_names.from_torch(
        vssd.TORCH_TABLE,
        dict.fromkeys(["norm.weight", "norm.wait", "x.num_batches_tracked", "head"], np.zeros(1)),
    )
    assert (ignored, unknown) == (["x.num_batches_tracked"], ["norm.wait", "head"])


def test_roi_linear_reads_channels_last_features():
    rng = np.random.default_rng(0)
    features, weight = rng.standard_normal((5, 7, 7)), rng.standard_normal((3, 5 * 7 * 7))
    rows = {row.ours: row for row in mask_rcnn.FAMILY.torch_table}
    layout = rows["box_head.fc1"].kind[0].layout
    kernel = layout.from_torch(weight)
    np.testing.assert_allclose(
        features.transpose(1, 2, 0).reshape(-1) @ kernel, weight @ features.reshape(-1)
    )
    np.testing.assert_array_equal(layout.to_torch(kernel), weight)


def test_deconv_kernel_places_pixels_as_pytorch():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((4, 2, 3)), rng.standard_normal((4, 5, 2, 2))
    expected = torch.nn.functional.conv_transpose2d(
        torch.from_numpy(x)[None], torch.from_numpy(weight), stride=2
    )[0].numpy()
    kernel = torch_names.DECONV[0].layout.from_torch(weight)
    for a in range(2):
        for b in range(2):
            got = np.einsum("chw,co->ohw", x, kernel[a, b])
            np.testing.assert_allclose(got, expected[:, a::2, b::2])
