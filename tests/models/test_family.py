"""Models by name."""

import dataclasses

import jax
import pytest
from flax import nnx

from vssd_jax.errors import UserError
from vssd_jax.models import family
from vssd_jax.models.family import Family, architecture, find, make_config


@dataclasses.dataclass(frozen=True)
class Inner:
    width: int = 4
    rate: float = 0.1
    sizes: tuple[int, ...] = (1, 2)

    def __post_init__(self):
        if self.width < 0:
            raise ValueError("width is negative")


@dataclasses.dataclass(frozen=True)
class Outer:
    backbone: Inner
    num_classes: int = 3
    depth: int = 2


class Module(nnx.Module):
    def __init__(self, config, *, num_classes, dtype, remat, implementation, rngs):
        self.config, self.num_classes = config, num_classes
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (config.backbone.width,)))


TOY = Family(
    prefix="toy_", variants={"small": lambda: Outer(Inner()), "wide": lambda: Outer(Inner(8))},
    module=Module, num_classes=None, classifier=("head.",), torch_table=(),
    recognise=lambda shapes, known, given: None, variant_fields=(),
)  # fmt: skip


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    """The family is registered, until the end of a test."""
    monkeypatch.setattr(family, "_FAMILIES", dict(family._FAMILIES))
    assert family.register(TOY) is TOY


def test_a_registered_family_is_found():
    assert TOY in family.families()
    listed = family.list_models()
    assert listed.index("toy_wide") == listed.index("toy_small") + 1
    assert find("toy_wide") == (TOY, "wide")
    assert find("vssd_tiny")[1] == "tiny"
    model = family.abstract(lambda rngs: family.build("toy_wide", rngs=rngs, depth=1))
    assert model.config == Outer(Inner(8), depth=1)
    assert model.num_classes is None
    assert model.kernel.shape == (8,)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("toy_smal", "unknown model 'toy_smal'; did you mean 'toy_small'"),
        ("vssd_", "unknown model 'vssd_'; "),
        ("toy_", "unknown model 'toy_'; "),
        ("nothing alike", "choose from vssd_nano, "),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(UserError, match=message):
        find(name)


def test_fields_of_the_config_and_of_its_backbone():
    config = make_config("toy_small", width=6, rate=1, depth=5, sizes=[3])
    assert config == Outer(Inner(6, 1, (3,)), depth=5)
    assert architecture(config) == {
        "num_classes": 3, "depth": 5, "width": 6, "rate": 1, "sizes": (3,),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widht": 1}, "toy_small has no option 'widht'; did you mean 'width'"),
        ({"num_classes": 1}, "no option 'num_classes'"),
        ({"backbone": Inner()}, "no option 'backbone'"),
        ({"width": 1.5}, "toy_small: width=1.5 must be like 4"),
        ({"width": True}, "must be like 4"),
        ({"sizes": (1, "2")}, "must be like"),
        ({"sizes": 1}, "must be like"),
        ({"width": -1}, "toy_small: width is negative"),
    ],
)
def test_wrong_fields(options, message):
    with pytest.raises(UserError, match=message):
        make_config("toy_small", **options)
