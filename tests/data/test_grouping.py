"""Orders in which every batch can be stacked."""

import numpy as np
import pytest

from vssd_jax.data import pipeline
from vssd_jax.data.grouping import GroupedByOrientation, GroupedByShape
from vssd_jax.data.segmentation_transforms import eval_shapes, eval_transform
from vssd_jax.errors import UserError


def test_batches_of_one_shape_stack_and_hold_every_picture_once():
    shapes = [(40, 60), (60, 40), (40, 60), (80, 120), (40, 60), (50, 50)]
    source = [
        {"image": np.zeros((*shape, 3), np.uint8), "label": np.zeros(shape, np.uint8), "index": i}
        for i, shape in enumerate(shapes)
    ]
    options = {"short": 32, "long": 128, "multiple": 8, "label_multiple": 64}
    grouped = GroupedByShape(source, (eval_shapes(x, **options) for x in shapes), 2)
    assert len(grouped) % 2 == 0
    seen = []
    for first in range(0, len(grouped), 2):
        pair = [grouped[first], grouped[first + 1]]
        outs = [eval_transform(element, **options) for element in pair]
        np.stack([out["images"]["0"] for out in outs])
        np.stack([out["label"] for out in outs])
        seen += [element["index"] for element in pair if element["valid"]]
    assert sorted(seen) == list(range(6))


class Sizes:
    def __init__(self, portrait):
        self.sizes = np.where(np.array(portrait)[:, None], [[4, 3]], [[3, 4]])

    def __getitem__(self, index):
        return {"index": index}


def test_batches_of_one_orientation():
    source = Sizes(np.arange(23) % 3 == 0)
    portrait = source.sizes[:, 0] > source.sizes[:, 1]
    shuffled = GroupedByOrientation(source, 4, seed=1, steps=10)
    order = np.array([shuffled[i]["index"] for i in range(len(shuffled))]).reshape(-1, 4)
    for batch in order:
        assert len(set(portrait[batch])) == 1
    first, second = order.reshape(2, -1)
    assert len(set(first)) == len(first) == 20  # 15 landscapes: 12; 8 portraits: 8
    assert first.tolist() != second.tolist()
    again = GroupedByOrientation(source, 4, seed=1, steps=10)
    assert [again[i]["index"] for i in range(40)] == order.ravel().tolist()

    every = GroupedByOrientation(source, 4)
    elements = [every[i] for i in range(len(every))]
    assert sorted(e["index"] for e in elements if e["valid"]) == list(range(23))
    assert len(elements) == 24
    for i in range(0, 24, 4):
        assert len({portrait[e["index"]] for e in elements[i : i + 4]}) == 1
    with pytest.raises(UserError, match="there are 15 landscape and 8 portrait images"):
        GroupedByOrientation(source, 16, seed=1, steps=1)


def test_a_source_that_shuffles_itself_keeps_its_order():
    source = Sizes(np.arange(23) % 3 == 0)
    grouped = GroupedByOrientation(source, 4, seed=1, steps=7)

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
    grouped = GroupedByOrientation(Sizes(np.arange(23) % 3 == 0), 4)
    batches = list(pipeline.eval_batches(grouped, lambda element: element, batch_size=4))
    index, valid = (np.concatenate([b[name] for b in batches]) for name in ("index", "valid"))
    assert len(index) == 24
    assert sorted(index[valid]) == list(range(23))
