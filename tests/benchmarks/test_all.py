"""One command for every figure: what it records, within its minutes."""

import json
import subprocess
import sys

import pytest

from benchmarks.all import markdown, parts, run_parts
from tests.conftest import ROOT

MACHINE = {"device": "a card", "cpu": "a CPU", "jax": "1.0", "date": "2026-01-01", "commit": ""}
RESULT = """
import json, sys
line = {"benchmark": "x", "row": {"task": "a", "ms": 1.23456}, "options": {"batch": 2}}
with open(sys.argv[1].removeprefix("--lines="), "a") as file:
    file.write(json.dumps(line | {"machine": %r}) + "\\n")
print("measured", flush=True)
""" % MACHINE  # noqa: UP031 - braces are the program's


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_parts_that_fail_or_hang_are_recorded_and_the_others_go_on(tmp_path):
    output = tmp_path / "all.jsonl"
    hangs = f"{RESULT}\nimport time\ntime.sleep(600)"
    chosen = {
        "fails": (1, ["-c", "print('so far'); raise ValueError('no card')"]),
        "hangs": (0.3, ["-c", hangs]),
        "works": (1, ["-c", RESULT]),
    }
    assert not run_parts(chosen, output, 0.2, MACHINE)
    rows = {line["row"]["part"]: line["row"] for line in read(output) if "part" in line["row"]}
    assert [row["end"] for row in rows.values()] == ["failed", "out of time", "done"]
    assert rows["fails"]["last line"] == "ValueError: no card"
    assert rows["hangs"]["last line"] == "measured"
    assert 0 < rows["hangs"]["seconds"] < 6
    # What a part had measured before it ran out of time is there, and in the order of time.
    assert [line["benchmark"] for line in read(output)] == ["all", "x", "all", "x", "all"]
    assert "so far" in output.with_suffix(".log").read_text()

    # Once more, without a minute: results are added.
    assert run_parts({"late": chosen["works"]}, output, 0, MACHINE)
    assert read(output)[-1]["row"]["last line"] == "not begun"
    text = markdown(read(output))
    assert text.count("On a card, a CPU, 1.0, 2026-01-01:") == 1
    assert "| batch | task | ms |\n| --- | --- | --- |\n| 2 | a | 1.235 |" in text


def test_table_of_a_file(tmp_path):
    row = {"model": "tiny", "ms": 2.0, "failed": "a | b"}
    line = {"benchmark": "model", "row": row, "options": {"model": ["tiny"], "rounds": 5}}
    (tmp_path / "x.jsonl").write_text(json.dumps(line | {"machine": MACHINE}) + "\n")
    command = [sys.executable, "-m", "benchmarks.all", "--table", str(tmp_path / "x.jsonl")]
    said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "| tiny | 2 | a \\| b |" in said


def test_parts_are_modules_with_the_options_given():
    for small in (True, False):
        for share, (flag, module, *options) in parts(small).values():
            assert 0 < share <= 1
            assert flag == "-m"
            if module != "pytest":
                text = (ROOT / f"{module.replace('.', '/')}.py").read_text()
                text += (ROOT / "benchmarks/common.py").read_text()
                for option in options:
                    if option.startswith("--"):
                        assert f'"{option.partition("=")[0]}"' in text


def run_all(tmp_path, *options):
    output = tmp_path / "all.jsonl"
    command = [sys.executable, "-m", "benchmarks.all", f"--output={output}", *options]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr + output.with_suffix(".log").read_text()
    assert output.with_suffix(".md").read_text() in run.stdout
    return read(output)


def test_on_a_cpu(tmp_path):
    row, end = run_all(tmp_path, "--only", "inference")
    assert row["row"]["images/s"] > 0
    assert {"device", "cpu", "jax", "date", "commit"} <= set(row["machine"])
    assert end["row"]["end"] == "done"


@pytest.mark.slow
def test_all_of_it_on_a_cpu(tmp_path):
    lines = run_all(tmp_path, "--minutes=30")
    ends = {line["row"]["part"]: line["row"]["end"] for line in lines if line["benchmark"] == "all"}
    assert ends == dict.fromkeys(parts(small=True), "done")
    assert {line["benchmark"] for line in lines} == {"all", "ops", "model", "compare_torch"}
