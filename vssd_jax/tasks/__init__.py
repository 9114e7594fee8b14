"""What the training loop needs to know of each task.

A task has `num_classes`, `dataset_classes`, `image_shape` (what multiply-adds and throughput are
given for), `train_size`, `train_batches(start_step)`, `eval_batches()`, `build(rngs)`,
`loss(model, batch, *, step, rngs, teacher)`, `check(metrics)`, `eval_step(model, batch)`,
`summarize(outputs)`, `table` (what eval.py prints besides the metrics, or None) and
`best_metric`; see classification.py.
"""

import os

from vssd_jax.errors import UserError, did_you_mean

TASKS = ("classification", "detection", "segmentation")


def make_task(config, *, tta: bool = False, save_predictions: str | os.PathLike | None = None):
    """The task that `config.task` names.

    Args:
      config: of the run.
      tta: average predictions over scaled and mirrored images; segmentation only.
      save_predictions: a folder for predictions and pictures; detection and segmentation only.
    """
    if tta and config.task != "segmentation":
        raise UserError(f"--tta is for segmentation, and the config's task is {config.task}")
    if config.task == "classification":
        if save_predictions is not None:
            raise UserError("--save-predictions is for detection and segmentation")
        from vssd_jax.tasks.classification import Classification

        return Classification(config)
    if config.task == "detection":
        from vssd_jax.tasks.detection import Detection

        return Detection(config, save_predictions=save_predictions)
    if config.task == "segmentation":
        from vssd_jax.tasks.segmentation import Segmentation

        return Segmentation(config, tta=tta, save_predictions=save_predictions)
    raise UserError(f"unknown task {config.task!r}{did_you_mean(config.task, TASKS)}")
