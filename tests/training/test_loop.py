"""Whole runs of a small model on the digits: files, resume, compilation, several devices."""

import html
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import scipy.special
from absl import flags

from configs.digits import get_config
from tests.browser import dump_dom, find, served
from tests.conftest import GOLDEN, ROOT, UNOPTIMIZED
from tests.golden.synthetic import _rng
from tests.golden_model import golden_images, golden_weights, relative_error
from tests.golden_model import run as run_model
from tests.resume import assert_same_run, train_with_stops
from vssd_jax.config import classification_config
from vssd_jax.errors import UserError
from vssd_jax.inference.evaluation import evaluate_weights
from vssd_jax.models.split import SplitModel
from vssd_jax.tasks import make_task
from vssd_jax.tasks.classification import Classification
from vssd_jax.training.loop import train
from vssd_jax.training.metrics import read_metrics
from vssd_jax.weights.checkpoint import read_ema
from vssd_jax.weights.folder import Weights, write_folder

EPOCH = 1437 // 128  # steps


@pytest.fixture(scope="module", autouse=True)
def parsed_flags():
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["tests"])  # Grain reads absl flags


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("data"))


def small_config(data_dir, epochs=2):
    config = get_config()
    config.model_options = {
        "embed_dim": 8, "depths": (1, 0, 0, 1), "num_heads": (1, 1, 2, 2), "d_state": 8,
        "drop_path": 0.1, "stem": "patch", "downsample": "patch",  # compile fast
    }  # fmt: skip
    config.update(
        data_dir=data_dir, batch_size=128, eval_batch_size=128, epochs=epochs, log_every_steps=1,
        mesa=0.5, mesa_start_epoch=1, mixup_alpha=0.2, warmup_epochs=0.5,
    )  # fmt: skip
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory, data_dir):
    """A finished run: its config, workdir, result and the compilations while it ran."""
    compiled = []

    def listen(event, _, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(len(read_metrics(workdir)))  # lines written so far: when it happened

    jax.monitoring.register_event_duration_secs_listener(listen)
    workdir = tmp_path_factory.mktemp("run") / "digits"
    config = small_config(data_dir)
    results = train(make_task(config), config, workdir)
    jax.monitoring.unregister_event_duration_listener(listen)
    return config, workdir, results, compiled


def losses(workdir):
    lines = read_metrics(workdir)
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def test_a_run_writes_what_is_promised(run):
    _, workdir, results, _ = run
    lines = read_metrics(workdir)
    train_lines = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in train_lines] == list(range(1, 2 * EPOCH + 1))
    for name in ("train/learning_rate", "train/images_per_second", "train/grad_norm"):
        assert all(line[name] >= 0 for line in train_lines)
    evaluations = [line for line in lines if "val/top1" in line]
    assert [line["step"] for line in evaluations] == [EPOCH, 2 * EPOCH]
    assert evaluations[-1]["val/top1"] == results["val/top1"]
    assert 0 <= results["val/top1"] <= results["val/top5"] <= 1
    assert train_lines[EPOCH - 1]["train/mesa"] == 0 < train_lines[EPOCH]["train/mesa"]
    falling = [line["train/loss"] - 0.5 * line["train/mesa"] for line in train_lines]
    assert falling[-1] < falling[EPOCH] < falling[0]
    assert (workdir / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list(workdir.glob("events.out.tfevents.*"))
    assert json.loads((workdir / "config.json").read_text())["num_classes"] == 10
    assert not list(workdir.glob("*.part*"))


MEASURE = """<!doctype html><title>m</title><pre id=result></pre>
<iframe src=report.html width=1280 height=900></iframe>
<iframe src=report.html width=400 height=900></iframe>
<script>
addEventListener("load", () => {
  const seen = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, all = (rule) => [...page.querySelectorAll(rule)];
    all("details").forEach(part => { part.open = true; });
    return {
      sections: all("section").map(part => part.id),
      sideways: page.documentElement.scrollWidth - page.documentElement.clientWidth,
      classes: all("#classes tbody tr").map(row => row.cells[0].innerText).sort(),
      counts: all("#confusion-matrix .matrix td").map(cell => Number(cell.innerText) || 0),
      lines: all("#curves .line").map(line => line.getTotalLength() > 0),
      pictures: all("#worst-mistakes img, #a-few-predictions img").map(img => img.naturalWidth),
      values: all("#summary .tiles b").map(value => value.innerText),
      fields: all("#config details td:first-child").map(cell => cell.innerText),
      repeat: all("#how-to-repeat pre").map(part => part.innerText),
      scripts: all("script").length,
      loaded: frame.contentWindow.performance.getEntriesByType("resource")
        .map(entry => entry.name).filter(name => !name.startsWith("data:")),
    };
  });
  document.querySelector("#result").textContent = JSON.stringify(seen);
});
</script>"""


def test_a_browser_finds_the_parts_of_the_report(run, tmp_path):
    config, workdir, results, _ = run
    browser = find()
    shutil.copy(workdir / "report.html", tmp_path)
    (tmp_path / "measure.html").write_text(MEASURE)
    with served(tmp_path) as address:
        done = dump_dom(browser, f"{address}/measure.html", tmp_path / "profile", seconds=20)
    found = re.search(r'<pre id="result">(.+?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    for seen in json.loads(html.unescape(found[1])):
        assert seen["sections"] == [
            "summary", "curves", "data", "classes", "confusion-matrix", "worst-mistakes",
            "a-few-predictions", "metrics", "config", "environment", "how-to-repeat",
        ]  # fmt: skip
        assert seen["sideways"] <= 0
        assert seen["classes"] == list(map(str, range(10)))
        assert sum(seen["counts"]) == 360
        assert len(seen["lines"]) > 3
        assert all(seen["lines"])
        assert len(seen["pictures"]) == 16 + 8
        assert all(seen["pictures"])
        assert seen["values"][0] == f"{results['val/top1']:.4g}"
        assert set(config.keys()) == set(seen["fields"])
        assert str(workdir) in seen["repeat"][0]
        assert seen["scripts"] == 0
        assert seen["loaded"] == []


def test_nothing_is_compiled_after_the_first_steps(run):
    _, workdir, _, compiled = run
    lines = read_metrics(workdir)
    first_evaluation = next(i for i, line in enumerate(lines) if "val/top1" in line)
    assert compiled
    # After the first evaluation, the curves and the first save: nothing.
    assert max(compiled) <= first_evaluation + 1


def test_evaluation_of_the_workdir_gives_the_same_numbers(run, tmp_path, capsys):
    config, workdir, results, _ = run
    commands = [("Evaluate", "python eval.py --config 'a & b'")]
    path = tmp_path / "report.html"
    again = evaluate_weights(config, workdir, report=path, commands=commands)
    assert {name: again[name] for name in results} == results
    page = path.read_text()
    of_the_run = (workdir / "report.html").read_text()
    for name in ("classes", "confusion-matrix", "worst-mistakes"):  # the same, to the byte
        part = re.search(f'<section id="{name}">.*?</section>', page)[0]
        assert part in of_the_run
    assert 'id="curves"' not in page
    assert "python eval.py --config &#x27;a &amp; b&#x27;" in page
    assert "parameters" in capsys.readouterr().out


def test_a_finished_run_is_not_repeated(run, capsys):
    config, workdir, results, _ = run
    before = [(workdir / name).read_bytes() for name in ("metrics.jsonl", "report.html")]
    assert train(make_task(config), config, workdir) == results
    after = [(workdir / name).read_bytes() for name in ("metrics.jsonl", "report.html")]
    assert after == before
    printed = capsys.readouterr().out
    assert f"{results['val/top1']:.4f}" in printed
    for word in ("versions: python", "devices: 1 cpu", "mesh: data 1, fsdp 1", "head.kernel",
                 "memory per device: state", '"batch_size": 128'):  # fmt: skip
        assert word in printed


def test_a_run_past_its_end_is_evaluated(run, tmp_path, capsys):
    config, _, _, _ = run
    config = config.copy_and_resolve_references()
    config.steps = 5

    class Stopping(Classification):
        def train_batches(self, start_step):
            for index, batch in enumerate(super().train_batches(start_step), start_step):
                if index == 3:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

    assert train(Stopping(config), config, tmp_path) == {}
    page = (tmp_path / "report.html").read_text()
    assert "There was no evaluation since the run last started" in page
    assert re.search(r"was stopped at step \d of 5; it can go on", page)
    assert "<svg" in page
    assert 'id="classes"' not in page
    config.steps = 1
    results = train(make_task(config), config, tmp_path)
    assert read_metrics(tmp_path)[-1]["val/top1"] == results["val/top1"]
    printed = capsys.readouterr().out
    assert "the config differs from this workdir's: steps was 5, is 1" in printed
    assert "nothing was trained: the run was to end at step 1" in printed
    assert 'id="classes"' in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_stopped_run_resumes_bitwise(run, tmp_path, num_workers):
    config, workdir, results, _ = run
    config = config.copy_and_resolve_references()
    config.num_workers = num_workers
    stops = 3, EPOCH + 4, 2 * EPOCH - 1
    assert train_with_stops(Classification, config, tmp_path, stops) == results
    assert_same_run(tmp_path, workdir)


@pytest.mark.parametrize(("where", "kind"), [("data", UserError), ("evaluation", LookupError)])
def test_an_error_costs_no_step(run, tmp_path, capsys, where, kind):
    config, _, _, _ = run

    class Failing(Classification):
        def train_batches(self, start_step):
            for index, batch in enumerate(super().train_batches(start_step), start_step):
                if where == "data" and index == 3:
                    raise kind("the pictures are gone")
                yield batch

        def summarize(self, *args, **kwargs):
            if where == "evaluation":
                raise kind("the pictures are gone")
            return super().summarize(*args, **kwargs)

    with pytest.raises(kind, match="the pictures are gone"):
        train(Failing(config), config, tmp_path)
    step = int(re.search(r"is saved at step (\d+)", capsys.readouterr().out)[1])
    assert step == EPOCH if where == "evaluation" else 0 < step <= 3
    assert read_ema(tmp_path)[1] == step


def test_a_workdir_in_use_is_refused(run):
    config, workdir, _, _ = run
    hold = "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX)"
    hold += "; print(flush=True); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", hold, str(workdir / "lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with other:
        other.stdout.readline()
        with pytest.raises(UserError, match="in use by process"):
            train(make_task(config), config, workdir)
        other.stdin.write("\n")


def test_another_model_in_the_workdir_is_refused(run):
    config, workdir, _, _ = run
    other = config.copy_and_resolve_references()
    other.model_options = {**config.model_options, "d_state": 4}
    with pytest.raises(UserError, match="does not fit the config"):
        train(make_task(other), other, workdir)


class GoldenTask(Classification):
    """Classification of the golden case's images, which are normalised, with soft targets."""

    train_size = 6 * 4  # six steps an epoch
    class_names = tuple(map(str, range(10)))

    def normalize(self, images):
        return images

    def augment(self, batch, rngs):
        return batch["image"], batch["label"]

    def train_batches(self, start_step):
        for index in range(start_step, 12):
            yield {
                "image": golden_images((4, 3, 64, 64), 100 + index, np.float64),
                "label": _rng("targets", 100 + index).dirichlet(np.full(10, 0.3), 4),
                "replaced": np.zeros(4, np.int32),
            }

    def eval_batches(self):
        yield {
            "image": golden_images((2, 3, 64, 64), dtype=np.float64),
            "label": np.array([3, 7]),
            "replaced": np.zeros(2, np.int32),
            "valid": np.ones(2, bool),
        }


@pytest.fixture
def x64_everywhere():
    """float64 in Orbax's threads too."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def test_training_follows_the_authors_code(x64_everywhere, tmp_path):
    """Twelve steps in float64 with MESA, the average of weights and statistics, and clipping."""
    golden = np.load(GOLDEN / "training_nano.npz")
    settings = json.loads(str(golden["settings"]))
    config = classification_config()
    config.update(
        model="vssd_nano", dtype="float64", batch_size=4, eval_batch_size=2, epochs=2,
        eval_every_epochs=2, log_every_steps=1, mesa=settings["mesa"], mesa_start_epoch=1,
        ema_decay=settings["ema_decay"], weight_decay=settings["weight_decay"],
        clip_grad_norm=settings["clip_grad_norm"],
        # A warm-up that ends with the run: 2.5e-5 more at every step.
        warmup_learning_rate=2.5e-5, learning_rate=3.25e-4, warmup_steps=12,
    )  # fmt: skip
    weights, workdir = tmp_path / "weights", tmp_path / "run"
    write_folder(weights, Weights("vssd_nano", 10, {}, golden_weights("classification_nano")))
    config.init_from = str(weights)
    train(GoldenTask(config), config, workdir)

    lines = read_metrics(workdir)
    for index, line in enumerate(lines[:12]):
        assert line["train/learning_rate"] == pytest.approx(golden["lr"][index], rel=1e-9)
        assert line["train/loss"] == pytest.approx(golden["loss"][index], rel=1e-9)
        assert line["train/grad_norm"] == pytest.approx(golden["grad_norm"][index], rel=1e-8)
    # The average, as evaluated and as saved.
    logits = golden["final_ema_logits"]
    expected = scipy.special.logsumexp(logits, axis=1) - logits[[0, 1], [3, 7]]
    assert lines[12]["val/loss"] == pytest.approx(expected.mean(), rel=1e-7)
    model = SplitModel(GoldenTask(config).build)
    images = golden_images((2, 3, 64, 64), dtype=np.float64)
    result = run_model(model.merge(read_ema(workdir)[0], training=False), images)
    assert relative_error(result, logits) < 1e-7


SEVERAL_DEVICES = """
import sys
from absl import flags
flags.FLAGS(["test"])
from tests.training.test_loop import small_config
from vssd_jax.tasks import make_task
from vssd_jax.training.loop import train
config = small_config(sys.argv[1])
config.update(steps=20, eval_batch_size=120, dtype="float64", mesa=0.0)
# The smaller model lets rounding grow to 1e-4 within these steps.
config.model_options.update(depths=(1, 1, 1, 1), stem="conv", downsample="conv")
config.mesh.fsdp = 4 if sys.argv[2].endswith("8") else 1
train(make_task(config), config, sys.argv[2])
"""


@pytest.mark.slow
def test_eight_devices_train_as_one(tmp_path, data_dir):
    # The eight split the parameters too: {"data": 2, "fsdp": 4}.
    workdirs = [tmp_path / str(devices) for devices in (1, 8)]
    for workdir in workdirs:
        count = f"--xla_force_host_platform_device_count={workdir.name}"
        # Without fusion emitters, pixels are normalised (in float32) with other roundings on one
        # device than on eight.
        count += f" {UNOPTIMIZED}"
        subprocess.run(
            [sys.executable, "-c", SEVERAL_DEVICES, data_dir, str(workdir)],
            cwd=ROOT,
            # In float32 Adam makes the rounding of different sums visible within steps.
            env={**os.environ, "XLA_FLAGS": count, "JAX_ENABLE_X64": "1", "PYTHONPATH": str(ROOT)},
            check=True,
            capture_output=True,
        )
    one, eight = (losses(workdir) for workdir in workdirs)
    assert list(one) == list(range(1, 21))
    np.testing.assert_allclose(list(eight.values()), list(one.values()), rtol=0, atol=1e-5)
    one, eight = (read_metrics(workdir)[-1] for workdir in workdirs)
    assert eight["val/loss"] == pytest.approx(one["val/loss"], abs=1e-5)
    assert eight["val/top1"] == one["val/top1"]
    # A checkpoint of the one mesh is read on another: here, on one device.
    (one, _), (eight, _) = (read_ema(workdir) for workdir in workdirs)
    for name, value in one.items():
        np.testing.assert_allclose(eight[name], value, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be a whole number of at least 1"),
        ({"accumulate": 3}, "use a multiple of 3"),
        ({"batch_norm_images": 0}, "batch_norm_images=0 must be a whole number of at least 1"),
        ({"batch_norm_images": 48}, "batch_norm_images=48 does not divide config.batch_size=128"),
        ({"batch_norm_images": 64, "accumulate": 4}, "batch_size=128 in 4 micro-batches"),
        ({"mesh": {"data": 3}}, "does not fit 1 devices"),
        ({"mesh": {"data": -1, "fsdp": 2}}, "does not fit 1 devices"),
        ({"profile_steps": "15:10"}, "must be like 10:15"),
        ({"batch_size": 2048}, "more than the 1437 images"),
        ({"dataset": "digit"}, "did you mean 'digits'"),
        ({"task": "sorting"}, "unknown task 'sorting'"),
        ({"model": "vssd_nono"}, "did you mean 'vssd_nano'"),
        ({"schedule": "cosin"}, "one of cosine, linear, steps"),
    ],
)
def test_impossible_configs_are_refused(changes, message, data_dir, tmp_path):
    config = small_config(data_dir)
    config.update(changes)
    with pytest.raises(UserError, match=message):
        train(make_task(config), config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
