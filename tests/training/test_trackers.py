"""Trackers: modules that only note their calls, and the real packages where they are installed."""

import importlib.machinery
import itertools
import json
import subprocess
import sys
import types

import jax
import pytest

from tests.conftest import ROOT
from vssd_jax import config as configs
from vssd_jax.errors import UserError
from vssd_jax.training.metrics import read_metrics
from vssd_jax.training.plan import Plan
from vssd_jax.training.run import open_run
from vssd_jax.training.trackers import ADAPTERS, check_installed

PLAN = Plan(
    steps_per_epoch=3, total=3, batch_size=2, log_every=1, eval_every=3, save_every=None,
    profiled=range(0),
)  # fmt: skip
# Every variable that a test or a tracker may look at.
VARIABLES = (
    "WANDB_PROJECT", "WANDB_NAME", "WANDB_DIR", "WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL",
    "WANDB_RUN_ID", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "TRACKIO_SPACE_ID",
    "TRACKIO_SERVER_URL",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _environment(monkeypatch, tmp_path):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    # The tracker sets it, and monkeypatch puts back what it was.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    # No reports to the makers of the packages.
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))


def opened(workdir, tracker, **fields):
    config = {"max_nonfinite": 3, "tracker": tracker, "betas": (0.9, 0.999), **fields}
    return open_run(workdir, config, PLAN, best_metric="val/score", checkpoint_bytes=0)


def train(workdir, tracker, *, evaluate=False, **fields):
    """A run of three steps, the loss of the second NaN; an evaluation draws, which takes long."""
    with opened(workdir, tracker, **fields) as run:
        for step, _ in run.steps(itertools.count()):
            run.done(step, {"loss": float("nan") if step == 2 else float(step)})
            run.log(0.1, 0)
        if evaluate:
            run.evaluate(lambda arrays: arrays, {"val/score": 0.5})
    assert [line["step"] for line in read_metrics(workdir)] == [1, 2, 3, *[3] * evaluate]


def fail(workdir, tracker):
    """A run that its first step ends."""
    with opened(workdir, tracker) as run:
        step, _ = next(run.steps(itertools.count()))
        run.done(step, {"loss": float("nan")})
        run.log(0.1, 3)


class Notes(list):
    """The calls of a tracker's module, (name, arguments) each."""

    def named(self, name):
        return [arguments for called, arguments in self if called == name]

    def losses(self):
        return {step: values["train/loss"] for step, values in self.named("log")
                if "train/loss" in values}  # fmt: skip


def plant(monkeypatch, name, **attributes):
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, origin="a test")
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, name, module)


def note_wandb(monkeypatch, notes):
    def init(**arguments):
        notes.append(("init", arguments))
        return types.SimpleNamespace(
            id=arguments["id"] or "made",
            log=lambda values, step: notes.append(("log", (step, values))),
            finish=lambda exit_code: notes.append(("close", exit_code)),
        )

    plant(monkeypatch, "wandb", init=init)


def note_mlflow(monkeypatch, notes):
    class MlflowClient:
        def __init__(self, uri):
            notes.append(("init", uri))

        def get_experiment_by_name(self, name):
            return None

        def create_experiment(self, name):
            notes.append(("experiment", name))
            return "7"

        def create_run(self, experiment, run_name):
            notes.append(("run", (experiment, run_name)))
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id="made"))

        def update_run(self, run, status):
            notes.append(("update", (run, status)))

        def log_batch(self, run, metrics=(), params=()):
            assert run == "made"
            notes.extend(("param", param) for param in params)
            for step in {metric[3] for metric in metrics}:
                notes.append(("log", (step, {name: value for name, value, *_ in metrics})))

        def set_terminated(self, run, status):
            notes.append(("close", status))

    plant(monkeypatch, "mlflow", MlflowClient=MlflowClient)
    entities = {"Metric": lambda *fields: fields, "Param": lambda *fields: fields}
    plant(monkeypatch, "mlflow.entities", **entities)


def note_trackio(monkeypatch, notes):
    plant(
        monkeypatch,
        "trackio",
        init=lambda project, **arguments: notes.append(("init", {"project": project, **arguments})),
        log=lambda values, step: notes.append(("log", (step, values))),
        finish=lambda: notes.append(("close", None)),
    )


@pytest.fixture(params=ADAPTERS)
def name(request):
    return request.param


@pytest.fixture
def notes(monkeypatch, name):
    notes = Notes()
    {"wandb": note_wandb, "mlflow": note_mlflow, "trackio": note_trackio}[name](monkeypatch, notes)
    return notes


# --- All of them ----------------------------------------------------------------------------------


def test_the_config_takes_the_trackers_that_there_are():
    config = configs.classification_config()
    for name in ("", *ADAPTERS):
        config.tracker = name
        configs.check(config)
    config.tracker = "tensorboard"
    with pytest.raises(UserError, match=r"config.tracker='tensorboard' must be one of wandb, ml"):
        configs.check(config)


def test_metrics_go_to_the_tracker_and_a_resumed_run_goes_on_in_it(tmp_path, name, notes):
    train(tmp_path / "run", name)
    assert len(notes.named("init")) == len(notes.named("close")) == 1
    assert notes[-1][0] == "close"
    losses = notes.losses()
    assert (losses[1], losses[3]) == (1, 3)
    assert losses[2] != losses[2]  # NaN is passed as it is
    recorded = (tmp_path / "run/tracker.json").read_bytes()
    (known,) = json.loads(recorded).items()
    assert known[0] == name

    notes.clear()
    train(tmp_path / "run", name)
    assert (tmp_path / "run/tracker.json").read_bytes() == recorded
    resumed = {
        "wandb": lambda: notes.named("init")[0]["id"],
        "mlflow": lambda: notes.named("update")[0][0],
        "trackio": lambda: notes.named("init")[0]["name"],
    }
    assert resumed[name]() == known[1]
    assert not notes.named("run")
    assert set(notes.losses()) == {1, 2, 3}


def test_a_missing_package_is_said_before_anything_is_written(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError) as error:
        train(tmp_path / "run", name)
    assert str(error.value) == (
        f"config.tracker='{name}' needs the package {name}: pip install 'vssd_jax[{name}]'"
    )
    assert not (tmp_path / "run").exists()


def test_a_folder_with_the_name_of_a_package_is_none(tmp_path, monkeypatch):
    (tmp_path / "no_such_tracker").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="needs the package no_such_tracker"):
        check_installed("no_such_tracker")


def test_an_error_on_the_way_is_said_once_and_training_goes_on(tmp_path, capsys, name, notes):
    with opened(tmp_path, name) as run:
        for step, _ in run.steps(itertools.count()):
            if step == 2:  # from now on the tracker raises
                notes.append = notes.extend = _refuse
            run.done(step, {"loss": float(step)})
            run.log(0.1, 0)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    assert set(notes.losses()) == {1}
    said = [line for line in capsys.readouterr().out.splitlines() if "tracker" in line]
    assert said == [
        f"config.tracker='{name}' gets no more metrics, training goes on: "
        "ConnectionError: the network is down"
    ]


def _refuse(*_):
    raise ConnectionError("the network\nis down")


def test_a_start_that_fails_ends_a_new_run_but_not_a_resumed_one(tmp_path, capsys, name, notes):
    append = notes.append
    notes.append = _refuse
    with pytest.raises(UserError) as error:
        train(tmp_path, name)
    assert str(error.value) == (
        f"config.tracker='{name}' cannot be started: ConnectionError: the network is down"
    )
    assert not (tmp_path / "tracker.json").exists()
    notes.append = append
    train(tmp_path, name)
    notes.append = _refuse
    capsys.readouterr()
    train(tmp_path, name)
    assert capsys.readouterr().out.count("gets no more metrics, training goes on") == 1


def test_only_the_main_process_logs(tmp_path, monkeypatch, name, notes):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with opened(tmp_path, name) as run:
        next(run.steps(itertools.count()))
    assert notes == []


def test_a_workdir_may_change_its_tracker(tmp_path, monkeypatch):
    note_wandb(monkeypatch, Notes())
    note_trackio(monkeypatch, Notes())
    train(tmp_path, "wandb")
    train(tmp_path, "trackio")
    train(tmp_path, "wandb")
    assert set(json.loads((tmp_path / "tracker.json").read_text())) == {"wandb", "trackio"}


def test_a_run_without_a_tracker_imports_none(tmp_path, monkeypatch):
    code = f"import sys, vssd_jax.training.loop; print(*(set({list(ADAPTERS)}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("\n", 0), done.stderr
    for name in ADAPTERS:
        monkeypatch.setitem(sys.modules, name, None)  # an import would fail
    train(tmp_path, "")
    assert not (tmp_path / "tracker.json").exists()


# --- Each of them ---------------------------------------------------------------------------------


def test_wandb_gets_workdir_and_config_but_its_environment_wins(tmp_path, monkeypatch):
    notes = Notes()
    note_wandb(monkeypatch, notes)
    train(tmp_path / "digits", "wandb", evaluate=True)
    assert (3, {"val/score": 0.5}) in notes.named("log")
    (given,) = notes.named("init")
    assert (given["project"], given["name"]) == ("vssd_jax", "digits")
    assert (given["dir"], given["id"]) == (str(tmp_path / "digits"), None)
    assert given["config"]["betas"] == (0.9, 0.999)
    for variable in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_DIR"):
        monkeypatch.setenv(variable, f"my {variable}")
    train(tmp_path / "digits", "wandb")
    given = notes.named("init")[-1]
    assert [given[key] for key in ("project", "name", "dir")] == [
        "my WANDB_PROJECT", "my WANDB_NAME", "my WANDB_DIR",
    ]  # fmt: skip


def test_mlflow_gets_workdir_and_config_but_its_environment_wins(tmp_path, monkeypatch):
    notes = Notes()
    note_mlflow(monkeypatch, notes)
    train(tmp_path / "digits", "mlflow")
    assert notes.named("init") == [(tmp_path / "digits/mlruns").as_uri()]
    assert notes.named("experiment") == ["vssd_jax"]
    assert notes.named("run") == [("7", "digits")]
    assert ("betas", "[0.9, 0.999]") in notes.named("param")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://here")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    train(tmp_path / "other", "mlflow")
    assert (notes.named("init")[-1], notes.named("experiment")[-1]) == ("http://here", "mine")


def test_trackio_gets_a_name_of_its_own_for_each_workdir(tmp_path, monkeypatch):
    notes = Notes()
    note_trackio(monkeypatch, notes)
    for folder in ("a", "b"):
        train(tmp_path / folder / "digits", "trackio")
    first, second = notes.named("init")
    assert first["project"] == "vssd_jax"
    assert first["config"]["betas"] == (0.9, 0.999)
    assert first["name"].startswith("digits-")
    assert first["name"] != second["name"]


@pytest.mark.parametrize(
    ("tracker", "note", "failed"), [("wandb", note_wandb, 1), ("mlflow", note_mlflow, "FAILED")]
)
def test_a_run_that_an_error_ends_is_marked(tmp_path, monkeypatch, tracker, note, failed):
    notes = Notes()
    note(monkeypatch, notes)
    with pytest.raises(UserError, match="not finite"):
        fail(tmp_path, tracker)
    assert notes.named("close") == [failed]


# --- The packages themselves, without a network ---------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # theirs
def test_wandb_itself_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # it reads its environment once
    monkeypatch.setenv("WANDB_MODE", "offline")
    for _ in range(2):
        train(tmp_path / "run", "wandb")
    known = json.loads((tmp_path / "run/tracker.json").read_text())["wandb"]
    files = sorted((tmp_path / "run/wandb").glob(f"offline-run-*-{known}/run-{known}.wandb"))
    assert files
    assert all(file.stat().st_size > 0 for file in files)
    assert not list((tmp_path / "run/wandb").glob("run-*"))


@pytest.mark.filterwarnings("ignore")
def test_wandb_itself_without_a_key(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    wandb.teardown()
    monkeypatch.setenv("HOME", str(tmp_path))  # where a key may be
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(UserError, match=r"tracker='wandb' cannot be started: .*API key"):
        train(tmp_path / "run", "wandb")


@pytest.mark.filterwarnings("ignore")
def test_mlflow_itself_in_files(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    for _ in range(2):
        train(tmp_path / "run", "mlflow", evaluate=True, class_names=["a long name"] * 1000)
    known = json.loads((tmp_path / "run/tracker.json").read_text())["mlflow"]
    client = mlflow.MlflowClient((tmp_path / "run/mlruns").as_uri())
    (experiment,) = [e for e in client.search_experiments() if e.name == "vssd_jax"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_id, run.info.run_name, run.info.status) == (known, "run", "FINISHED")
    assert run.data.params["betas"] == "[0.9, 0.999]"
    history = client.get_metric_history(known, "train/loss")
    assert [metric.step for metric in history] == [1, 2, 3, 1, 2, 3]
    assert [metric.value for metric in history if metric.step != 2] == [1, 3, 1, 3]
    assert run.data.metrics["val/score"] == 0.5


@pytest.mark.filterwarnings("ignore")
def test_mlflow_itself_without_its_server(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match="tracker='mlflow' cannot be started: ") as error:
        train(tmp_path / "run", "mlflow")
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore")
def test_trackio_itself_in_files(tmp_path):
    trackio = pytest.importorskip("trackio")
    for _ in range(2):
        train(tmp_path / "run", "trackio")
    known = json.loads((tmp_path / "run/tracker.json").read_text())["trackio"]
    (run,) = [run for run in trackio.Api().runs("vssd_jax") if run.name == known]
    assert run.config["betas"] == [0.9, 0.999]
