"""Every figure of a device by one command, what is worth most first, within some minutes.

    python -m benchmarks.all --minutes 9              # GPU
    python -m benchmarks.all                          # CPU, or --small: networks of a few pixels
    python -m benchmarks.all --table FILE             # the table of a file of results, again

Each result is added to a file of JSON lines as soon as it is there, with device, CPU, JAX, date and
commit. A part that fails, or takes more than its share of the minutes that are left, is recorded
with the last line that it printed, and the others go on. What the parts print is in a file of the
same name that ends with .log, and the table, in Markdown, in one that ends with .md.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
ABOUT = ("device", "cpu", "jax", "date", "commit")


def parts(small: bool) -> dict[str, tuple[float, list[str]]]:
    """By name: the greatest share of the minutes left, and the arguments of Python."""
    if small:
        tiny = ["--rounds=1", "--seconds=0.01"]
        model = ["-m", "benchmarks.model", "--batch=2", "--image-size=32", *tiny]
        torch = ["-m", "benchmarks.compare_torch", "--model=nano", "--batch=2", "--image-size=32",
                 "--processes=1", *tiny, "--torch"]  # fmt: skip
        return {
            "operations": (1, ["-m", "benchmarks.ops", "--batch=1", "--directions=forward", *tiny]),
            "inference": (1, [*model, "--tasks=inference"]),
            "training": (1, [*model, "--tasks=training"]),
            "PyTorch": (1, [*torch, "eager"]),
            "PyTorch compiled": (1, [*torch, "compile"]),
            "detection": (1, [*model, "--config=digits_detection"]),
            "segmentation": (1, [*model, "--config=digits_segmentation"]),
        }
    model = ["-m", "benchmarks.model", "--rounds=5", "--seconds=0.3"]
    torch = ["-m", "benchmarks.compare_torch", "--batch=128", "--dtype=bfloat16", "--rounds=5",
             "--seconds=0.3", "--torch"]  # fmt: skip
    return {
        # Other tests need packages that only training does.
        "GPU tests": (0.2, ["-m", "pytest", "-m", "gpu", "-q", "-n", "8", "--maxprocesses=8",
                            "tests/kernels"]),
        "operations": (0.2, ["-m", "benchmarks.ops", "--rounds=3", "--seconds=0.05"]),
        "inference": (0.35, [*model, "--tasks=inference"]),
        "training": (0.5, [*model, "--tasks=training"]),
        "PyTorch": (0.4, [*torch, "eager"]),
        "PyTorch compiled": (0.5, [*torch, "compile"]),
        "detection": (0.6, [*model, "--config=mask_rcnn:tiny,1x", "--batch=2"]),
        "segmentation": (1, [*model, "--config=upernet:tiny", "--batch=2"]),
    }


def run(command: list[str], log: Path, seconds: float, env: dict) -> tuple[str, str]:
    """How a command ended, "done", "failed" or "out of time", and the last line it printed."""
    with log.open("ab") as file:
        file.write(f"\n--- {' '.join(command)}\n".encode())
        file.flush()
        start = file.tell()
        try:
            code = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, timeout=seconds, env=env
            ).returncode
            end = "failed" if code else "done"
        except subprocess.TimeoutExpired:
            end = "out of time"
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").split("\n")
    return end, next((line.strip() for line in reversed(lines) if line.strip()), "")


def run_parts(chosen: dict, output: Path, minutes: float, about: dict) -> bool:
    """Runs the parts one after the other; whether none of them failed."""
    ends, until = [], time.monotonic() + 60 * minutes
    log = output.with_suffix(".log")
    with tempfile.TemporaryDirectory() as cache:
        # Parts share what they compile.
        env = {"JAX_COMPILATION_CACHE_DIR": cache, **os.environ}
        for name, (share, arguments) in chosen.items():
            start = time.monotonic()
            end, line, lines = "out of time", "not begun", []
            if until > start:
                lines = [f"--lines={output}"] if "pytest" not in arguments else []
                command = [sys.executable, arguments[0], arguments[1], *lines, *arguments[2:]]
                end, line = run(command, log, share * (until - start), env)
            # What went well is in the results already, but for the number of tests.
            line = "" if end == "done" and lines else line[:300]
            seconds = round(time.monotonic() - start, 1)
            row = {"part": name, "end": end, "seconds": seconds, "last line": line}
            write(output, {"benchmark": "all", "row": row, "options": {}, "machine": about})
            print(", ".join(map(str, row.values())), flush=True)
            ends.append(end)
    return "failed" not in ends


def write(output: Path, content: dict) -> None:
    with output.open("a") as file:
        file.write(json.dumps(content) + "\n")


def markdown(lines: list[dict]) -> str:
    """A table of each benchmark on each machine; the options of a run are named above it."""
    groups: dict[tuple, list[dict]] = {}
    for line in lines:
        machine = ", ".join(str(line["machine"][key]) for key in ABOUT if line["machine"][key])
        groups.setdefault((machine, line["benchmark"]), []).append(shown(line) | line["row"])
    text, last = [], None
    for (machine, benchmark), rows in groups.items():
        if machine != last:
            text.append(f"On {machine}:")
        last = machine
        heads = list(dict.fromkeys(head for row in rows for head in row))
        cells = [[cell(row.get(head, "")) for head in heads] for row in rows]
        table = [heads, ["---"] * len(heads), *cells]
        text.append("\n".join([f"`{benchmark}`", "", *(f"| {' | '.join(r)} |" for r in table)]))
    return "\n\n".join(text) + "\n"


def shown(line: dict) -> dict:
    """The options of a line that its row lacks and a reader needs."""
    wanted = ("model", "image_size", "batch", "dtype")
    names = {name: name.replace("_", " ") for name in wanted if name in line["options"]}
    return {text: line["options"][name] for name, text in names.items() if text not in line["row"]}


def cell(value) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--output", type=Path, help="file of results, which are added to it "
                        "(default: all_PLATFORM_DATE.jsonl in benchmarks/results)")
    parser.add_argument("--only", nargs="+", help="parts, in place of all")
    parser.add_argument("--small", action="store_true", help="the sizes of a CPU")
    parser.add_argument("--table", type=Path, help="print the table of this file, and no more")
    options = parser.parse_args()
    if options.table:
        print(table(options.table))
        return
    # This process leaves the device to the parts.
    ask = "import json; from benchmarks.common import machine; print(json.dumps(machine()))"
    said = subprocess.run([sys.executable, "-c", ask], check=True, stdout=subprocess.PIPE).stdout
    about = json.loads(said.splitlines()[-1])
    output = options.output or RESULTS / f"all_{about['platform']}_{about['date']}.jsonl"
    output.parent.mkdir(parents=True, exist_ok=True)
    chosen = parts(options.small or about["platform"] != "gpu")
    if unknown := set(options.only or ()) - set(chosen):
        parser.error(f"no part {sorted(unknown)}; there are {', '.join(chosen)}")
    chosen = {name: part for name, part in chosen.items() if name in (options.only or chosen)}
    fine = run_parts(chosen, output, options.minutes, about)
    output.with_suffix(".md").write_text(table(output))
    print(f"\n{table(output)}\nwrote {output}, and .log and .md beside it")
    sys.exit(not fine)


def table(path: Path) -> str:
    return markdown([json.loads(line) for line in path.read_text().splitlines()])


if __name__ == "__main__":
    main()
