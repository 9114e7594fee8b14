"""For mkdocs: the pages that lie at the top of the repository are part of the site too."""

import pathlib
import re
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
COPIES = {
    "LICENSE": "LICENSE.txt",
    "CITATION.cff": "CITATION.cff.txt",
    "examples/tour.ipynb": "tour.ipynb",
}


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages, their links rewritten, and the files that they link to."""
    for name, target in PAGES.items():
        text = _relinked((ROOT / name).read_text(encoding="utf-8"), "")
        files.append(File.generated(config, target, content=text))
    for name, target in COPIES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, target, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links from docs/ to the top of the repository."""
    return _relinked(markdown, "../")


def _relinked(text: str, up: str) -> str:
    """`text` with links as in the repository made links of the site."""
    for name, target in (PAGES | COPIES).items():
        text = re.sub(rf"\]\({re.escape(up + name)}(?=[)#])", f"]({target}", text)
    return text if up else re.sub(r"\]\(docs/", "](", text)
