import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from torch_reference import create_model as torch_model
from vssd_jax.models import family
from vssd_jax.models.count import count_multiply_adds, count_parameters


@pytest.mark.parametrize(
    ("name", "parameters", "multiply_adds"),
    [
        ("vssd_micro", 13_512_964, 2.387e9),
        ("vssd_tiny", 24_270_724, 4.664e9),  # the paper's 4.5 G leave out a product
        ("vssd_small", 40_075_650, 7.709e9),
        ("vssd_base", 88_823_151, 16.649e9),
    ],
)
def test_the_papers_models(name, parameters, multiply_adds):
    model = family.abstract(lambda rngs: family.build(name, rngs=rngs))
    assert count_parameters(model) == parameters
    assert count_multiply_adds(model, (224, 224)) == pytest.approx(multiply_adds, rel=2e-4)


# Of the multiply-adds the paper has 220, 265 (less the product above) and 325 G.
DETECTORS = {
    "mask_rcnn_vssd_micro": (33_218_220, 221.15e9),
    "mask_rcnn_vssd_tiny": (43_909_644, 269.07e9),
    "mask_rcnn_vssd_small": (59_714_570, 332.19e9),
}


@pytest.mark.parametrize("name", DETECTORS)
def test_parameters_of_the_papers_detectors(name):
    model = family.abstract(lambda rngs: family.build(name, rngs=rngs))
    assert count_parameters(model) == DETECTORS[name][0]


@pytest.mark.slow
@pytest.mark.parametrize("name", DETECTORS)
def test_multiply_adds_of_the_papers_detectors(name):
    model = family.abstract(lambda rngs: family.build(name, rngs=rngs))
    assert count_multiply_adds(model, (800, 1280)) == pytest.approx(DETECTORS[name][1], rel=2e-4)


@pytest.mark.parametrize(
    "options", [{}, {"expand": 1}, {"mixers": ("attention",) * 4}, {"downsample": "patch"}]
)
def test_as_pytorch_counts(options):
    model = family.abstract(lambda rngs: family.build("vssd_nano", rngs=rngs, **options))
    reference = torch_model("vssd_nano", num_classes=1000, **options).eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # products in sight
        reference(torch.zeros(1, 3, 65, 96))
    assert count_parameters(model) == sum(p.numel() for p in reference.parameters())
    assert 2 * count_multiply_adds(model, (65, 96)) == counter.get_total_flops()
