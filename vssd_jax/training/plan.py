"""The plan of a run: the steps at which it logs, evaluates, saves, profiles and ends."""

import dataclasses
import re

import ml_collections

from vssd_jax.config import total_steps
from vssd_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Plan:
    """The steps of a run, numbered from 1.

    Attributes:
      steps_per_epoch: whole batches of the training set.
      total: the last step.
      batch_size: global.
      log_every, eval_every: in steps; the last step logs and evaluates too.
      save_every: in steps; evaluations save too. None: they alone do.
      profiled: the steps of the trace.
      patience: evaluations without a better metric that end the run; 0: none do.
    """

    steps_per_epoch: int
    total: int
    batch_size: int
    log_every: int
    eval_every: int
    save_every: int | None
    profiled: range
    patience: int = 0

    def logs(self, step: int) -> bool:
        return step % self.log_every == 0 or step == self.total

    def evaluates(self, step: int) -> bool:
        return step % self.eval_every == 0 or step == self.total

    def saves(self, step: int) -> bool:
        return self.evaluates(step) or (
            self.save_every is not None and step % self.save_every == 0
        )


def make_plan(config: ml_collections.ConfigDict, train_size: int) -> Plan:
    """The plan of a config for a training set of `train_size` images.

    Raises:
      UserError: a batch larger than the training set, or profiled steps that are no range.
    """
    steps_per_epoch = train_size // config.batch_size if config.batch_size > 0 else train_size
    if steps_per_epoch == 0:
        raise UserError(
            f"config.batch_size={config.batch_size} is more than the {train_size} images "
            "for training"
        )
    return Plan(
        steps_per_epoch=steps_per_epoch,
        total=total_steps(config, steps_per_epoch),
        batch_size=config.batch_size,
        log_every=config.log_every_steps,
        eval_every=config.eval_every_epochs * steps_per_epoch,
        save_every=config.save_every_steps,
        profiled=_parse_range(config.profile_steps),
        patience=config.patience,
    )


def _parse_range(text: str) -> range:
    """The steps of `config.profile_steps`: "10:15" are 10, 11, ... 15."""
    if not text:
        return range(0)
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None or not 0 < int(match[1]) <= int(match[2]):
        raise UserError(f"config.profile_steps={text!r} must be like 10:15, the first and the last")
    return range(int(match[1]), int(match[2]) + 1)
