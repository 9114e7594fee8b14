"""Metrics on disk (metrics.jsonl, TensorBoard files and curves.png) and for a tracker."""

import json
import os
import pathlib

from vssd_jax import strict_json
from vssd_jax.distributed import is_main
from vssd_jax.training.trackers import Tracker


def read_metrics(workdir: str | pathlib.Path) -> list[dict]:
    """The lines of `metrics.jsonl`; a line that a killed run left unfinished is dropped."""
    path = pathlib.Path(workdir) / "metrics.jsonl"
    if not path.exists():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


class MetricWriter:
    """Writes named scalars by step; of several processes only the main one writes.

    A value that is not finite is null in `metrics.jsonl`.

    Args:
      workdir: folder of the run.
      start_step: lines of an earlier run for later steps are dropped, as those steps run again.
      tracker: gets all values too, and is closed with the writer.
    """

    def __init__(
        self, workdir: str | pathlib.Path, start_step: int, tracker: Tracker | None = None
    ) -> None:
        self._workdir, self._tracker = pathlib.Path(workdir), tracker
        if not is_main():
            return
        from tensorboardX import SummaryWriter  # slow to import: with PyTorch, if that is there

        kept = [line for line in read_metrics(workdir) if line["step"] <= start_step]
        path = self._workdir / "metrics.jsonl"
        part = path.with_suffix(".part")
        part.write_text("".join(strict_json.dumps(line) + "\n" for line in kept))
        os.replace(part, path)
        self._file = path.open("a")
        self._tensorboard = SummaryWriter(str(self._workdir), purge_step=start_step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        if not is_main():
            return
        values = {name: float(value) for name, value in values.items()}
        self._file.write(strict_json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)
        if self._tracker is not None:
            self._tracker.log(step, values)

    def plot(self) -> None:
        """Draws every metric against the step into `curves.png`."""
        if not is_main():
            return
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        curves: dict[str, list[tuple[int, float]]] = {}
        for line in read_metrics(self._workdir):
            for name, value in line.items():
                if name != "step" and value is not None:
                    curves.setdefault(name, []).append((line["step"], value))
        names = sorted(curves, key=lambda name: (not name.startswith("val/"), name))
        columns = min(3, len(names)) or 1
        rows = -(-len(names) // columns) or 1
        width, height = 4.5 * columns, 3 * rows  # inches
        figure = Figure(figsize=(width, height))
        FigureCanvasAgg(figure)
        # Room for the texts, said: to find it out matplotlib would draw everything twice.
        figure.subplots_adjust(
            0.75 / width, 0.5 / height, 1 - 0.15 / width, 1 - 0.35 / height, 0.22, 0.42
        )
        for index, name in enumerate(names):
            axes = figure.add_subplot(rows, columns, index + 1)
            axes.plot(
                *zip(*curves[name], strict=True), marker="." if len(curves[name]) < 30 else None
            )
            axes.set_title(name)
            axes.set_xlabel("step")
            axes.grid(alpha=0.3)
        part = self._workdir / "curves.part.png"
        figure.savefig(part, dpi=110)
        os.replace(part, self._workdir / "curves.png")

    def close(self) -> None:
        if not is_main():
            return
        self._file.close()
        self._tensorboard.close()
        if self._tracker is not None:
            self._tracker.close()
