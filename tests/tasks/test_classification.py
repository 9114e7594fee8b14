"""What classification counts: every readable picture of an evaluation, and the unreadable ones."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from configs.digits import get_config
from vssd_jax.errors import UserError
from vssd_jax.tasks.classification import Classification, label_rank, soft_cross_entropy

# 20 classes; picture i is of class i, and its logits decide whether it is top-1, top-5 or neither.
LOGITS = np.zeros((8, 20), np.float32)
LOGITS[0, 0] = 1  # right
LOGITS[1, [4, 5, 1]] = 3, 2, 1  # third
LOGITS[2, 10:] = 1  # eleventh
LOGITS[3:, 19] = 1  # wrong; most are masked


def evaluate(task, replaced, valid):
    output = task.eval_step(
        lambda images: jnp.asarray(LOGITS),
        {
            "image": jnp.zeros((8, 4, 4, 3), jnp.uint8),
            "label": jnp.arange(8),
            "replaced": jnp.asarray(replaced),
            "valid": jnp.asarray(valid),
        },
    )
    # The same batch twice: sums, not means of means.
    return task.summarize([{name: np.asarray(value) for name, value in output.items()}] * 2)


def test_padding_and_unreadable_pictures_do_not_count():
    config = get_config()
    config.max_unreadable = 0.5
    task = Classification(config)
    results = evaluate(task, replaced=[0, 0, 0, 1, 0, 0, 0, 1], valid=np.arange(8) < 4)
    log_sum = np.log(np.exp(LOGITS[:3]).sum(axis=1))
    expected = {
        "val/top1": 1 / 3,
        "val/top5": 2 / 3,
        "val/loss": (log_sum - [1, 1, 0]).mean(),
        "val/unreadable": 1 / 4,
    }
    assert results == pytest.approx(expected)


def test_equal_scores_are_no_win():
    assert label_rank(jnp.zeros((2, 20)), jnp.array([0, 7])).tolist() == [19, 19]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_wrong_and_said(value, monkeypatch, capsys):
    monkeypatch.setitem(globals(), "LOGITS", np.where(np.arange(20) == 0, value, LOGITS))
    results = evaluate(Classification(get_config()), np.zeros(8), np.arange(8) < 3)
    assert (results["val/top1"], results["val/top5"]) == (0, 0)
    assert not np.isfinite(results["val/loss"])
    assert "the scores of 6 of 6 pictures are not finite" in capsys.readouterr().out


def test_too_many_unreadable_pictures_end_the_run():
    config = get_config()
    config.max_unreadable = 0.25
    task = Classification(config)
    task.check({"train/unreadable": 0.25})
    message = r"26.0% of the last pictures of data are unreadable, .*max_unreadable=25.0%"
    with pytest.raises(UserError, match=message):
        task.check({"train/unreadable": 0.26})
    valid = np.ones(8, bool)
    assert evaluate(task, [1, 1, 0, 0, 0, 0, 0, 0], valid)["val/unreadable"] == 0.25
    with pytest.raises(UserError, match=r"37.5% of the pictures for evaluation of data"):
        evaluate(task, [1, 1, 1, 0, 0, 0, 0, 0], valid)


def test_weights_of_classes_are_torchs():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((6, 4)).astype(np.float32)
    targets = rng.dirichlet(np.ones(4), 6).astype(np.float32)
    weights = rng.uniform(0.2, 5, 4).astype(np.float32)
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(logits), torch.tensor(targets), weight=torch.tensor(weights)
    )
    got = soft_cross_entropy(jnp.asarray(logits), jnp.asarray(targets), weights)
    assert float(got) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    ("given", "expected"),
    [("balanced", [20 / 24, 20 / 6, 20 / 30]), ("1, 2,0.5", [1, 2, 0.5]), (None, None)],
)
def test_weights_come_from_the_config(given, expected, monkeypatch):
    config = get_config()
    config.class_weights, config.num_classes = given, 3
    task = Classification(config)
    labels = np.repeat(np.arange(3), (8, 2, 10))
    monkeypatch.setattr(task, "class_counts", lambda: np.eye(3)[labels])
    weights = task.class_weights
    assert weights is None if expected is None else weights == pytest.approx(expected)
    if given == "1, 2,0.5":
        config.num_classes = 4
        with pytest.raises(UserError, match="class_weights has 3 numbers for 4 classes"):
            _ = Classification(config).class_weights
