"""Orders in which every batch can be stacked."""

import numpy as np

from vssd_jax.data import pipeline
from vssd_jax.data.grouping import Grouped, ShuffledByOrientation, by_key, is_portrait
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


def test_evaluation_has_batches_of_one_orientation():
    portrait = is_portrait(SIZES)
    every = Grouped(Numbers(), by_key(portrait), SIZES, 4)
    elements = [every[i] for i in range(len(every))]
    assert sorted(e["index"] for e in elements if e["valid"]) == list(range(23))
    assert len(elements) == 24
    for i in range(0, 24, 4):
        kinds = {portrait[e["index"]] for e in elements[i : i + 4]}
        assert len(kinds) == 1
        assert {e["like"] for e in elements[i : i + 4]} == {(4, 3) if kinds.pop() else (3, 4)}


def test_training_has_at_most_one_mixed_batch_an_epoch():
    portrait = is_portrait(SIZES)
    shuffled = ShuffledByOrientation(Numbers(), SIZES, 4, seed=1, steps=100)
    order = np.array([shuffled[i]["index"] for i in range(len(shuffled))]).reshape(20, 5, 4)
    for epoch in order:
        assert len(set(epoch.ravel())) == 20
        kinds = portrait[epoch].sum(1)
        assert np.count_nonzero((kinds > 0) & (kinds < 4)) <= 1
    assert order[0].tolist() != order[1].tolist()
    for i in range(0, 400, 4):
        likes = {shuffled[i + k]["like"] for k in range(4)}
        most = portrait[order.ravel()[i : i + 4]].sum() > 2
        assert likes == {(4, 3) if most else (3, 4)}
    again = ShuffledByOrientation(Numbers(), SIZES, 4, seed=1, steps=100)
    assert [again[i]["index"] for i in range(400)] == order.ravel().tolist()


def test_the_rarer_orientation_is_trained_on():
    sizes = np.array([(3, 4)] * 8 + [(4, 3)] * 3)
    shuffled = ShuffledByOrientation(Numbers(), sizes, 4, seed=0, steps=60)
    counts = np.bincount([shuffled[i]["index"] for i in range(240)], minlength=11)
    assert (counts > 12).all()  # 240 / 11 is 21.8
    single = ShuffledByOrientation(Numbers(), sizes, 11, seed=0, steps=2)
    assert sorted(single[i]["index"] for i in range(11)) == list(range(11))
    assert {single[i]["like"] for i in range(22)} == {(3, 4)}


def test_a_source_that_shuffles_itself_keeps_its_order():
    grouped = ShuffledByOrientation(Numbers(), SIZES, 4, seed=1, steps=7)

    def read(**options):
        batches = pipeline.train_batches(
            grouped, lambda x, rng: x, batch_size=4, seed=0, shuffle=False, **options
        )
        return [batch["index"].tolist() for batch in batches]

    order = [[grouped[i + j]["index"] for j in range(4)] for i in range(0, 28, 4)]
    assert read() == order
    assert read(start_step=3) == order[3:]
    halves = [read(process_index=i, process_count=2) for i in range(2)]
    assert [a + b for a, b in zip(*halves, strict=True)] == order


def test_evaluation_marks_the_padding_of_the_source():
    grouped = Grouped(Numbers(), by_key(is_portrait(SIZES)), SIZES, 4)
    batches = list(pipeline.eval_batches(grouped, lambda element: element, batch_size=4))
    index, valid = (np.concatenate([b[name] for b in batches]) for name in ("index", "valid"))
    assert len(index) == 24
    assert sorted(index[valid]) == list(range(23))
