"""What the training loop needs to know of each task.

A task has `num_classes`, `dataset_classes`, `train_size`, `train_batches(start_step)`,
`eval_batches()`, `build(rngs)`, `loss(model, batch, *, step, rngs, teacher)`, `check(metrics)`,
`eval_step(model, batch)`, `summarize(outputs)` and `best_metric`; see classification.py.
"""

from vssd_jax.errors import UserError


def make_task(config):
    """The task that `config.task` names."""
    if config.task == "classification":
        from vssd_jax.tasks.classification import Classification

        return Classification(config)
    raise UserError(f"unknown task {config.task!r}; choose from classification")
