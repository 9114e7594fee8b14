"""Metrics that also go to Weights & Biases, MLflow or Trackio, by `config.tracker`."""

import importlib.util
import json
import os
import pathlib
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from vssd_jax import strict_json
from vssd_jax.distributed import is_main, say
from vssd_jax.errors import UserError

PROJECT = "vssd_jax"


class Tracker(Protocol):
    """Takes the metrics of a run. Any method may raise: training goes on without the tracker.

    Attributes:
      id: by which a resumed run finds its run of the tracker again.
    """

    id: str

    def log(self, step: int, values: dict[str, float]) -> None:
        """Notes the values of a step; of one step there may be several calls."""

    def close(self) -> None:
        """Sends what is left and ends the run."""


class _Wandb:
    def __init__(self, workdir: pathlib.Path, config: Mapping[str, Any], known: str | None) -> None:
        import wandb

        # W&B prefers arguments to its environment variables; here those shall win.
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", workdir.name),
            dir=os.environ.get("WANDB_DIR", str(workdir)),
            config=dict(config),
            id=known,
            resume="allow",
            allow_val_change=True,
        )
        self.id = self._run.id

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish(exit_code=int(_failing()))


class _MLflow:
    def __init__(self, workdir: pathlib.Path, config: Mapping[str, Any], known: str | None) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            uri = (workdir / "mlruns").as_uri()
            # MLflow refuses plain files unless asked; its databases need more packages.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        # Not mlflow.set_tracking_uri: it sets the environment variable, also for a later run.
        self._client, self._metric = MlflowClient(uri), Metric
        if known is not None:
            self.id = known
            self._client.update_run(known, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        self.id = self._client.create_run(experiment, run_name=workdir.name).info.run_id
        fields = [Param(key, strict_json.dumps(value)) for key, value in config.items()]
        self._client.log_batch(self.id, params=fields)

    def log(self, step: int, values: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self.id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self.id, "FAILED" if _failing() else "FINISHED")


class _Trackio:
    def __init__(self, workdir: pathlib.Path, config: Mapping[str, Any], known: str | None) -> None:
        import trackio

        # It finds runs by name alone, and two workdirs may have the same.
        self.id = known or f"{workdir.name}-{uuid.uuid4().hex[:8]}"
        self._trackio = trackio
        trackio.init(PROJECT, name=self.id, config=dict(config), resume="allow")

    def log(self, step: int, values: dict[str, float]) -> None:
        self._trackio.log(values, step=step)

    def close(self) -> None:
        self._trackio.finish()


ADAPTERS: dict[str, Callable[[pathlib.Path, Mapping[str, Any], str | None], Tracker]] = {
    "wandb": _Wandb, "mlflow": _MLflow, "trackio": _Trackio,
}  # fmt: skip


def check_installed(name: str) -> None:
    """Raises a UserError if the package of the tracker `name` is missing; "" needs none.

    The package is not imported.
    """
    if not name:
        return
    spec = importlib.util.find_spec(name)
    # Without an origin it is a folder of that name, such as W&B itself leaves behind.
    if spec is None or spec.origin is None:
        raise UserError(
            f"config.tracker={name!r} needs the package {name}: pip install 'vssd_jax[{name}]'"
        )


def open_tracker(workdir: pathlib.Path, config: Mapping[str, Any]) -> Tracker | None:
    """The tracker of `config.tracker`, on the process that writes; None without one.

    Its run's id is kept in `<workdir>/tracker.json`, and a resumed run goes on in the same. An
    error of the tracker later on is said once, and nothing more is sent to it.

    Raises:
      UserError: it cannot be started, for a run that it does not know yet.
    """
    name = config["tracker"]
    if not name or not is_main():
        return None
    workdir = workdir.resolve()
    path = workdir / "tracker.json"
    ids = json.loads(path.read_text()) if path.exists() else {}
    try:
        tracker = ADAPTERS[name](workdir, config, ids.get(name))
    except Exception as error:
        if name in ids:  # it worked before: no reason to keep a long run from going on
            _give_up(name, error)
            return None
        raise UserError(f"config.tracker={name!r} cannot be started: {_line(error)}") from error
    if name not in ids:
        part = path.with_suffix(".part")
        part.write_text(strict_json.dumps({**ids, name: tracker.id}) + "\n")
        os.replace(part, path)
    return _Guarded(name, tracker)


class _Guarded:
    """A tracker whose first error is said, and is the end of it."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self.id, self._name = tracker.id, name
        self._tracker: Tracker | None = tracker

    def log(self, step: int, values: dict[str, float]) -> None:
        self._attempt(lambda tracker: tracker.log(step, values))

    def close(self) -> None:
        self._attempt(lambda tracker: tracker.close())

    def _attempt(self, action: Callable[[Tracker], None]) -> None:
        if self._tracker is None:
            return
        try:
            action(self._tracker)
        except Exception as error:
            self._tracker = None
            _give_up(self._name, error)


def _give_up(name: str, error: Exception) -> None:
    say(f"config.tracker={name!r} gets no more metrics, training goes on: {_line(error)}")


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _failing() -> bool:
    """Whether an error ends the run: trackers are closed while it passes."""
    return sys.exc_info()[0] is not None
