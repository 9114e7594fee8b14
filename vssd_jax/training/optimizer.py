"""Learning-rate schedules and the optimizer, from the fields of a config."""

import jax.numpy as jnp
import ml_collections
import optax

from vssd_jax.config import total_steps
from vssd_jax.errors import UserError, did_you_mean
from vssd_jax.models.split import SplitModel


def make_schedule(config: ml_collections.ConfigDict, steps_per_epoch: int) -> optax.Schedule:
    """The learning rate by step: linear warm-up, then cosine, linear or step decay.

    The config's rates hold for a batch of `learning_rate_batch` images and scale with
    `batch_size`; None leaves them as they are.
    """
    scale = 1.0
    if config.learning_rate_batch is not None:
        scale = config.batch_size / config.learning_rate_batch
    peak = config.learning_rate * scale
    total = total_steps(config, steps_per_epoch)
    warmup = config.warmup_steps
    if warmup is None:
        warmup = round(config.warmup_epochs * steps_per_epoch)
    warmup = min(warmup, total)
    start, end = config.warmup_learning_rate * scale, config.min_learning_rate * scale
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(total - warmup, 1), end / peak)
    elif config.schedule == "linear":
        after = optax.linear_schedule(peak, end, max(total - warmup, 1))
    elif config.schedule == "steps":
        drops = {round(epoch * steps_per_epoch) - warmup: 0.1 for epoch in config.decay_epochs}
        after = optax.piecewise_constant_schedule(peak, drops)
    else:
        near = did_you_mean(config.schedule, ("cosine", "linear", "steps"))
        raise UserError(f"unknown schedule {config.schedule!r}{near}")
    if warmup > 0:
        after = optax.join_schedules([optax.linear_schedule(start, peak, warmup), after], [warmup])
    # In float64 where that is on: optax divides an int32 step in float32.
    return lambda step: after(jnp.asarray(step, float))


def decayed(model: SplitModel, no_decay: str) -> dict[str, bool]:
    """Which parameters have weight decay, by dotted name.

    Args:
      model: whose parameters these are.
      no_decay: "vectors" leaves out all with fewer than two dimensions (the classification
        recipe); "norms" only the parameters of norms, whatever their names (detection,
        segmentation).

    Raises:
      UserError: another `no_decay`.
    """
    shapes = model.parameter_shapes
    if no_decay == "vectors":
        return {name: len(shape) >= 2 for name, shape in shapes.items()}
    if no_decay == "norms":
        return {name: name not in model.norm_parameters for name in shapes}
    raise UserError(
        f"unknown no_decay {no_decay!r}{did_you_mean(no_decay, ('vectors', 'norms'))}"
    )


def make_optimizer(
    config: ml_collections.ConfigDict, schedule: optax.Schedule, mask: dict[str, bool]
) -> optax.GradientTransformation:
    """AdamW with decoupled weight decay, after clipping by the global norm.

    Args:
      config: of the run.
      schedule: the learning rate by step.
      mask: which parameters have weight decay, see `decayed`.
    """
    b1, b2 = config.betas
    adamw = optax.adamw(
        schedule,
        b1=b1,
        b2=b2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=mask,
    )
    if not config.clip_grad_norm:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_grad_norm), adamw)
