"""Learning-rate schedules and the optimizer, from the fields of a config."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import nnx

from vssd_jax.config import total_steps
from vssd_jax.errors import UserError, did_you_mean
from vssd_jax.models import family
from vssd_jax.models.split import SplitModel
from vssd_jax.training.packed import Packed, pack, unpack


def make_schedule(config: ml_collections.ConfigDict, steps_per_epoch: int) -> optax.Schedule:
    """The learning rate by step: linear warm-up, then cosine, linear or step decay.

    Cosine is the schedule of the classification recipe, in which the warm-up's N steps end with the
    peak at step N. Linear and steps are MMEngine's, of the detection and segmentation recipes, in
    which the last step of the warm-up has the peak, and the last step of a linear decay its end.

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
    rise = warmup if config.schedule == "cosine" else max(warmup - 1, 1)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(total - warmup, 1), end / peak)
    elif config.schedule == "linear":
        after = optax.linear_schedule(peak, end, max(total - warmup - 1, 1))
    elif config.schedule == "steps":
        drops = {round(epoch * steps_per_epoch) - warmup: 0.1 for epoch in config.decay_epochs}
        after = optax.piecewise_constant_schedule(peak, drops)
    else:
        near = did_you_mean(config.schedule, ("cosine", "linear", "steps"))
        raise UserError(f"unknown schedule {config.schedule!r}{near}")
    if warmup > 0:
        after = optax.join_schedules([optax.linear_schedule(start, peak, rise), after], [warmup])
    # In float64 where that is on: optax divides an int32 step in float32.
    return lambda step: after(jnp.asarray(step, float))


def decayed(model: SplitModel, no_decay: str) -> dict[str, bool]:
    """Which parameters have weight decay, by dotted name.

    Args:
      model: whose parameters these are.
      no_decay: "vectors" leaves out all with fewer than two dimensions (the classification
        recipe); "norms" only the parameters of norms, whatever their names (detection);
        "backbone_norms" only those of the backbone: the authors' key for segmentation, `norm`, does
        not match the names of the heads' BatchNorm, with which the paper's numbers were reached.

    Raises:
      UserError: another `no_decay`.
    """
    shapes = model.parameter_shapes
    if no_decay == "vectors":
        return {name: len(shape) >= 2 for name, shape in shapes.items()}
    if no_decay == "norms":
        return {name: name not in model.norm_parameters for name in shapes}
    if no_decay == "backbone_norms":
        spared = {name for name in model.norm_parameters if name.startswith("backbone.")}
        return {name: name not in spared for name in shapes}
    near = did_you_mean(no_decay, ("vectors", "norms", "backbone_norms"))
    raise UserError(f"unknown no_decay {no_decay!r}{near}")


def frozen_parts(config: ml_collections.ConfigDict) -> tuple[str, ...]:
    """How the names of the modules start that `freeze_stages` and `linear_probe` leave as they are.

    Raises:
      UserError: the model has no such stages.
    """
    if not config.freeze_stages and not config.linear_probe:
        return ()
    of_family, _ = family.find(config.model)
    if config.freeze_stages > max(len(of_family.stages) - 1, 0):
        raise UserError(
            f"config.freeze_stages={config.freeze_stages}, and {config.model} has "
            f"{max(len(of_family.stages) - 1, 0)} stages that can be frozen"
        )
    if config.linear_probe:
        if of_family.backbone is not None:
            return ("backbone.",)
        shapes = SplitModel(lambda rngs: _build(config, rngs)).parameter_shapes
        parts = {f"{name.partition('.')[0]}." for name in shapes}
        return tuple(sorted(parts - set(of_family.classifier)))
    return of_family.stages[: config.freeze_stages + 1]


def _build(config: ml_collections.ConfigDict, rngs: nnx.Rngs) -> nnx.Module:
    return family.build(config.model, rngs=rngs, **config.model_options)


def layer_rates(config: ml_collections.ConfigDict, names: Iterable[str]) -> dict[str, float] | None:
    """The factor of each parameter's learning rate, by dotted name; None if all are 1.

    With L layers before the head, layer i from the input has `layer_decay` ** (L - i) and the head
    1 (BEiT, arXiv 2106.08254, appendix). Weight decay has the same factor. 0 where it is frozen.

    Raises:
      UserError: the model says nothing of its layers.
    """
    frozen = frozen_parts(config)
    if config.layer_decay == 1 and not frozen:
        return None
    of_family, _ = family.find(config.model)
    if config.layer_decay < 1 and of_family.layers is None:
        raise UserError(f"config.layer_decay is not for {config.model}: its layers are not known")
    layers: list[tuple[str, ...]] = []
    if of_family.layers is not None and config.layer_decay < 1:
        layers = of_family.layers(family.make_config(config.model, **config.model_options))

    def rate(name: str) -> float:
        if name.startswith(frozen) and frozen:
            return 0.0
        place = next((i for i, layer in enumerate(layers) if name.startswith(layer)), len(layers))
        return config.layer_decay ** (len(layers) - place)

    return {name: rate(name) for name in names}


class Split(NamedTuple):
    """An optimizer on vectors, without what is done to each parameter in its own way.

    Attributes:
      update: `(gradient, state) -> ((updates, factor), state)`: the updates, as `Packed`, before
        weight decay and factors of the learning rate; and that of parameters that decay.
      constants: of each parameter by name: 1 where it decays, or 0; and its learning rate's factor.
    """

    update: Callable[[Any, Any], tuple[tuple[Packed, jax.Array], Any]]
    constants: dict[str, tuple[float, float]]


def make_split(
    config: ml_collections.ConfigDict,
    schedule: optax.Schedule,
    mask: dict[str, bool],
    rates: dict[str, float] | None = None,
) -> Split:
    """The `Split` of the packed optimizer that `make_optimizer` gives for these arguments."""
    optimizer = make_optimizer(config, schedule, mask, rates, packed=True, split=True)
    constants = {name: (float(mask[name]), rates[name] if rates else 1.0) for name in mask}
    return Split(optimizer.update, constants)


def make_optimizer(
    config: ml_collections.ConfigDict,
    schedule: optax.Schedule,
    mask: dict[str, bool],
    rates: dict[str, float] | None = None,
    *,
    packed: bool = False,
    split: bool = False,
) -> optax.GradientTransformation:
    """AdamW with decoupled weight decay, after clipping by the global norm.

    Args:
      config: of the run.
      schedule: the learning rate by step.
      mask: which parameters have weight decay, see `decayed`.
      rates: factors of the learning rate, see `layer_rates`.
      packed: whether gradients are clipped and moments kept as one vector; they may come as one.
      split: whether to leave weight decay and `rates` to a kernel, see `Split`. The state is the
        same.
    """
    decay = optax.add_decayed_weights(config.weight_decay, mask)
    adamw = optax.chain(
        _clipped_adam(config, packed, split),
        _alongside(config.weight_decay) if split else decay,
        optax.scale_by_learning_rate(schedule),
    )
    parts = [adamw]
    if config.clip_grad_norm:
        parts.insert(0, optax.identity())  # adamw's place in checkpoints, where clipping was apart
    if rates is not None:
        scaled = optax.stateless(lambda updates, _: {n: updates[n] * rates[n] for n in updates})
        parts.append(optax.identity() if split else scaled)
    return parts[0] if len(parts) == 1 else optax.chain(*parts)


def _alongside(factor: float) -> optax.GradientTransformation:
    """Takes a factor along with the updates, which what follows scales as it scales them."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return (updates, jnp.asarray(factor)), state

    return optax.GradientTransformation(optax.identity().init, update)


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """Gradients times one factor, so that the norm of all together is at most `limit`.

    optax's divides each value instead, and on a CPU XLA writes all of them to memory for it.
    """

    def update(gradient: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        norm = optax.tree.norm(gradient)
        factor = jnp.where(norm < limit, 1, limit / norm)
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), gradient), state

    return optax.GradientTransformation(optax.identity().init, update)


def _clipped_adam(
    config: ml_collections.ConfigDict, packed: bool, split: bool
) -> optax.GradientTransformation:
    b1, b2 = config.betas
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=config.epsilon)
    limit = config.clip_grad_norm
    clip = clip_by_global_norm(limit) if limit else optax.identity()

    def init(params: Any) -> Any:
        return adam.init(pack(params) if packed else params)

    def update(gradient: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if packed and not isinstance(gradient, Packed):
            gradient = pack(gradient)
        gradient, _ = clip.update(gradient, optax.EmptyState())
        updates, state = adam.update(gradient, state)
        return unpack(updates) if packed and not split else updates, state

    return optax.GradientTransformation(init, update)
