"""The commands that the pages name, and a folder to run them in."""

import os
import re
import shlex
import subprocess
import sys
from typing import NamedTuple

from tests.conftest import ROOT

PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
)
SCRIPTS = ("train.py", "eval.py", "predict.py", "export.py", "convert_torch_weights.py")
_SHELL = ("sh", "bash", "console", "shell")
# Of text in a line and of blocks without a language, what is a command.
_PROGRAMS = r"(?:\.venv/bin/)?(?:python|pip|make|docker \w+|srun|sbatch|mkdocs|hf|vssd-\w+) \S"


class Command(NamedTuple):
    """A command of a page.

    Attributes:
      page: from the repository's root.
      heading: that it stands below, the last of level 2.
      text: in one line, without what only comments.
      words: as a shell splits it, without settings of environment variables.
    """

    page: str
    heading: str
    text: str

    @property
    def words(self) -> list[str]:
        words = shlex.split(self.text)
        while words and re.match(r"\w+=", words[0]):
            del words[0]
        return words


def commands(page: str, heading: str | None = None) -> list[Command]:
    """Those of a page in the order of the text; below one heading, only those of its shell blocks.

    In the whole page also those inside of lines, of YAML, and of blocks without a language.
    """
    found = []
    for title, section in _sections((ROOT / page).read_text()):
        if heading not in (None, title):
            continue
        for kind, text in _pieces(section):
            if kind in _SHELL:
                lines = _lines(text)
            elif heading is not None:
                continue
            elif kind == "yaml":
                lines = [re.sub(r"\s+", " ", one) for one in _in_yaml(text)]
            else:
                lines = [line for line in _lines(text) if re.match(_PROGRAMS, line)]
            found += [Command(page, title, line) for line in lines]
    return found


def program(page: str, heading: str) -> str:
    """The first Python block below a heading."""
    return programs(page, heading)[0]


def programs(page: str, heading: str | None = None) -> list[str]:
    """The Python blocks of a page, or below one heading."""
    return [
        text
        for title, section in _sections((ROOT / page).read_text())
        for kind, text in _pieces(section)
        if kind == "python" and heading in (None, title)
    ]


def _sections(text: str) -> list[tuple[str, str]]:
    parts = re.split(r"^## (.*)\n", text, flags=re.MULTILINE)
    return [("", parts[0]), *zip(parts[1::2], parts[2::2], strict=True)]


def _pieces(section: str) -> list[tuple[str, str]]:
    """The blocks with their languages, and what is `code` inside of lines as of language "`"."""
    pieces = []
    for number, part in enumerate(re.split(r"^ *```", section, flags=re.MULTILINE)):
        if number % 2:
            kind, _, text = part.partition("\n")
            pieces.append((kind.strip(), text))
        else:
            pieces += [("`", re.sub(r"\s+", " ", code)) for code in re.findall(r"`([^`]+)`", part)]
    return pieces


def _lines(text: str) -> list[str]:
    """The commands of a shell's text: comments left out, continued lines and && taken apart."""
    joined = re.sub(r"\\\n\s*", "", text)
    lines = [re.sub(r"(^|\s)#.*", "", line).strip() for line in joined.splitlines()]
    return [part.strip() for line in lines for part in line.split(" && ") if part.strip()]


def _in_yaml(text: str) -> list[str]:
    """The commands in folded text, which end where a line stands further left."""
    return re.findall(r"exec (python (?:.+\n)(?: {14}--.+\n)*)", text)


def clone(folder):
    """`folder` with the commands and configs, as a clone has them."""
    for name in (*SCRIPTS, "configs"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def run(place, command, **environment):
    """The standard output of a command, which must succeed."""
    text = command if isinstance(command, str) else command.text
    words = [sys.executable if word == "python" else word for word in shlex.split(text)]
    environment = {**(environment or os.environ), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=place, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout
