"""Orders in which every batch can be stacked."""

import functools

import numpy as np

from vssd_jax.data import pipeline
from vssd_jax.data.geometry import draw_geometry
from vssd_jax.data.grouping import Grouped, ShuffledByShape, by_key
from vssd_jax.data.segmentation_transforms import eval_shapes, eval_transform


def test_batches_of_one_shape_stack_and_hold_every_picture_once():
    shapes = [(40, 60), (60, 40), (40, 60), (80, 120), (40, 60), (50, 50)]
    source = [
        {
            "image": np.zeros((*shape, 3), np.uint8),
            "label": np.zeros(shape, np.uint8),
            "index": i,
            "replaced": 0,
        }
        for i, shape in enumerate(shapes)
    ]
    options = {"short": 32, "long": 128, "multiple": 8, "label_multiple": 64}
    groups = by_key(eval_shapes(x, **options) for x in shapes)
    grouped = Grouped(source, groups, np.array(shapes), 2)
    assert len(grouped) % 2 == 0
    seen = []
    for first in range(0, len(grouped), 2):
        pair = [grouped[first], grouped[first + 1]]
        outs = [eval_transform(element, **options) for element in pair]
        np.stack([out["images"]["0"] for out in outs])
        np.stack([out["label"] for out in outs])
        seen += [element["index"] for element in pair if element["valid"]]
    assert sorted(seen) == list(range(6))


class Numbers:
    def __getitem__(self, index):
        return {"index": index}


SIZES = np.where((np.arange(23) % 3 == 0)[:, None], [[4, 3]], [[3, 4]])  # 8 portraits of 23
PORTRAIT = SIZES[:, 0] > SIZES[:, 1]
DRAW = functools.partial(draw_geometry, short_sides=(30,), long_side=45)
SHAPES = ((32, 48), (48, 32))


def shuffled(sizes, batch_size, steps, *, seed=1, draw=DRAW, shapes=SHAPES):
    return ShuffledByShape(
        Numbers(), sizes, batch_size, seed=seed, steps=steps, draw=draw, shapes=shapes
    )


def test_evaluation_has_batches_of_one_group():
    every = Grouped(Numbers(), by_key(PORTRAIT), SIZES, 4)
    elements = [every[i] for i in range(len(every))]
    assert sorted(e["index"] for e in elements if e["valid"]) == list(range(23))
    assert len(elements) == 24
    for i in range(0, 24, 4):
        kinds = {PORTRAIT[e["index"]] for e in elements[i : i + 4]}
        assert len(kinds) == 1
        assert {e["like"] for e in elements[i : i + 4]} == {(4, 3) if kinds.pop() else (3, 4)}


def test_training_has_at_most_one_mixed_batch_an_epoch():
    source = shuffled(SIZES, 4, 100)
    order = np.array([source[i]["index"] for i in range(len(source))]).reshape(20, 5, 4)
    for epoch in order:
        assert len(set(epoch.ravel())) == 20
        kinds = PORTRAIT[epoch].sum(1)
        assert np.count_nonzero((kinds > 0) & (kinds < 4)) <= 1
    assert order[0].tolist() != order[1].tolist()
    for i in range(0, 400, 4):
        shapes = {source[i + k]["shape"] for k in range(4)}
        most = PORTRAIT[order.ravel()[i : i + 4]].sum() > 2
        assert shapes == {(48, 32) if most else (32, 48)}
    again = shuffled(SIZES, 4, 100)
    assert [again[i]["index"] for i in range(400)] == order.ravel().tolist()
    assert "images: 2, each" in source.describe()
    mixed = PORTRAIT[order[0]].sum(1)
    fewer = int(np.minimum(mixed, 4 - mixed).sum())
    assert (f"; {fewer} of the 20 images" in source.describe()) == (fewer > 0)
    assert "no shape of" not in source.describe()
    small = shuffled(SIZES, 4, 100, shapes=((16, 24), (24, 16)))
    assert "; 20 of the 20 images" in small.describe()
    assert "0.40 at worst: no shape of config.padded_shapes holds them" in small.describe()


def test_pictures_of_every_shape_are_trained_on():
    sizes = np.array([(3, 4)] * 8 + [(4, 3)] * 3)
    source = shuffled(sizes, 4, 60, seed=0)
    counts = np.bincount([source[i]["index"] for i in range(240)], minlength=11)
    assert (counts > 12).all()  # 240 / 11 is 21.8
    single = shuffled(sizes, 11, 2, seed=0)
    assert sorted(single[i]["index"] for i in range(11)) == list(range(11))
    assert {single[i]["shape"] for i in range(22)} == {(32, 48)}


def test_the_shape_of_a_batch_holds_it_and_is_the_smallest():
    """Crops and many sizes: each picture has the size that it would have by itself."""
    rng = np.random.default_rng(0)
    sizes = np.stack([rng.integers(300, 640, 500), rng.integers(300, 640, 500)], 1)
    draw = functools.partial(draw_geometry, short_sides=(480, 640, 800), crop=True)
    shapes = ((800, 1344), (1344, 800), (640, 864), (864, 640), (640, 640))
    source = shuffled(sizes, 8, 62, draw=draw, shapes=shapes)
    epoch = source.epoch(0)
    batches = epoch.geometry.size.reshape(-1, 8, 2)
    exceeding = 0
    for shape, batch in zip(epoch.shapes, batches, strict=True):
        held = (batch <= shape).all()
        exceeding += not held
        smaller = [s for s in shapes if np.prod(s) < shape.prod()]
        assert not held or not any((batch <= s).all() for s in smaller)
    assert exceeding <= 1
    assert len(set(map(tuple, epoch.shapes.tolist()))) == 5
    # No matter what the others of its batch are: cropped and resized as drawn.
    both = [draw(sizes, np.random.default_rng(3)).size.mean(), epoch.geometry.size.mean()]
    np.testing.assert_allclose(*both, rtol=0.05)
    element = source[9]
    np.testing.assert_array_equal(element["geometry"].original, sizes[element["index"]])
    again = shuffled(sizes, 8, 62, draw=draw, shapes=shapes)[9]
    np.testing.assert_array_equal(element["geometry"].window, again["geometry"].window)


def test_a_source_that_shuffles_itself_keeps_its_order():
    grouped = shuffled(SIZES, 4, 7)

    def read(**options):
        batches = pipeline.train_batches(
            grouped, lambda x, rng: {"index": x["index"]}, batch_size=4, seed=0, shuffle=False,
            **options,
        )  # fmt: skip
        return [batch["index"].tolist() for batch in batches]

    order = [[grouped[i + j]["index"] for j in range(4)] for i in range(0, 28, 4)]
    assert read() == order
    assert read(start_step=3) == order[3:]
    halves = [read(process_index=i, process_count=2) for i in range(2)]
    assert [a + b for a, b in zip(*halves, strict=True)] == order


def test_evaluation_marks_the_padding_of_the_source():
    grouped = Grouped(Numbers(), by_key(PORTRAIT), SIZES, 4)
    batches = list(pipeline.eval_batches(grouped, lambda element: element, batch_size=4))
    index, valid = (np.concatenate([b[name] for b in batches]) for name in ("index", "valid"))
    assert len(index) == 24
    assert sorted(index[valid]) == list(range(23))
