"""The page of a report: what is in it, for any names, any numbers and any number of classes."""

import base64
import html.parser
import io
import re

import numpy as np
import pytest
from PIL import Image

from vssd_jax.tasks.protocol import Confusion, Gallery, Picture, Table
from vssd_jax.training import html_parts, html_report, svg_curves

VOID = {"meta", "img", "path", "circle"}


class Tags(html.parser.HTMLParser):
    """Checks that every tag is closed; counts them, and collects the text."""

    def __init__(self, page):
        super().__init__()
        self.open, self.counts, self.words, self.addresses = [], {}, [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.counts[tag] = self.counts.get(tag, 0) + 1

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def report(names, **changes):
    """Of classes with these names; the last of them is always taken for the first."""
    count = len(names)
    rows = [(name, 7, 1.0 if i else 0.0, "") for i, name in enumerate(names)]
    cells = np.stack((np.arange(count), np.arange(count), np.full(count, 7)), axis=1)
    cells[-1, 1] = 0
    pixels = np.zeros((8, 8, 3), np.uint8)
    fields = {
        "title": f"a model of {names[0]}",
        "facts": [("folder", f"/data/{names[0]}")],
        "results": {"val/top1": 0.5},
        "best_metric": "val/top1",
        "sections": [
            Table("Classes", ("class", "pictures", "accuracy", "taken for"), rows, names[0]),
            Confusion("Confusion matrix", names, names, cells),
            Gallery("Worst mistakes", [Picture([("", pixels)], [f"predicted: {names[0]}"])]),
        ],
        "lines": [{"step": 1, f"train/{names[0]}": 1.0}, {"step": 2, "train/loss": 2.0}],
        "config": {"class_names": names},
        "changed": {"class_names": names[:1]},
        "environment": [("versions", names[0])],
        "commands": [("Train", f"python train.py --config.class_names={names[0]}")],
        "notes": [names[0]],
    }
    return html_report.Report(**{**fields, **changes})


def test_every_text_is_escaped():
    name = "</style></pre><script>alert('x')</script><b>\"&amp;"
    page = html_report.render(report([name, "b"]))
    tags = Tags(page)
    assert "script" not in tags.counts
    # Only the tiles, with the metrics, are bold.
    assert tags.counts["b"] == 1
    assert sum(name in word for word in tags.words) >= 10
    assert tags.addresses
    assert all(address.startswith("data:image/") for address in tags.addresses)
    assert "url(" not in page


@pytest.mark.parametrize("count", [1, 2, 25, 26, 1000])
def test_any_number_of_classes(count):
    names = [f"class {i}" for i in range(count)]
    page = html_report.render(report(names))
    tags = Tags(page)
    table = re.search('<section id="classes">.*?</section>', page)[0]
    assert table.count("<tr>") == 1 + count
    matrix = re.search('<section id="confusion-matrix">.*?</section>', page)[0]
    assert ("class=heat" in matrix) == (count > 25)
    assert matrix.count("<th scope=row>") == (count if count <= 25 else 0)
    if count == 1:
        assert "Nothing was confused." in matrix
    else:
        wrong = f"<td>class {count - 1}</td><td>class 0</td><td class=number>7</td>"
        assert matrix.count(wrong) == 1
    assert tags.counts["img"] == (2 if count > 25 else 1)
    assert len(page) < 1_000_000


def test_what_is_beyond_a_table_is_counted():
    page = html_parts.table(("n",), [(i,) for i in range(1234)])
    assert page.count("<tr>") == 1001
    assert "… and 234 more" in page


def test_numbers_of_a_table():
    page = html_parts.table(("a", "b", "c", "d"), [("1", 12345, 0.98765, float("nan"))])
    values = re.findall("<td[^>]*>(.*?)</td>", page)
    assert values == ["1", "12,345", "98.8%", "-"]


def test_numbers_that_are_not_finite():
    lines = [{"step": s, "train/loss": None if s in (3, 4) else 1.0 * s} for s in range(1, 8)]
    lines += [{"step": 7, "val/loss": float("inf")}]
    page = html_report.render(
        report(["a"], results={"val/top1": float("nan"), "val/loss": None}, lines=lines)
    )
    Tags(page)
    assert page.count("<b>not finite</b>") == 2
    assert "3 values are not finite: gaps" in page
    line = re.search('class="line line0" d="(.*?)"', page)[1]
    assert line.count("M") == 2  # before the gap and after it
    assert line.count("L") == 1 + 2
    Tags(html_report.render(report(["a"], lines=[{"step": 1, "train/loss": None}], results={})))


def test_points_between_gaps_are_dots():
    points = [(step, 1.0 if step % 2 else None) for step in range(100)]
    drawn = svg_curves.draw("x", {"x": points})
    assert drawn.count("<circle") == 50
    assert 'class="line' not in drawn


def test_thinned_curves_keep_the_extremes_and_gaps():
    rng = np.random.default_rng(0)
    points = [(step, float(value)) for step, value in enumerate(rng.standard_normal(100_000))]
    points[4567], points[50_000] = (4567, 1e3), (50_000, None)
    kept = svg_curves.thinned(points)
    assert len(kept) <= 601
    assert (4567, 1e3) in kept
    assert min(v for _, v in kept if v is not None) == min(v for _, v in points if v is not None)
    assert sum(value is None for _, value in kept) == 1
    assert [step for step, _ in kept] == sorted(step for step, _ in kept)
    assert svg_curves.thinned(points[:10]) == points[:10]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (3, 3, [3]),
        (-7e-4, 2e-4, [-6e-4, -4e-4, -2e-4, 0, 2e-4]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert svg_curves.ticks(low, high) == pytest.approx(expected, abs=1e-12)


def test_a_matrix_of_counts():
    """The cells of a table of counts, and the colour of each by its share of the row."""
    cells = np.array([[0, 0, 15_000], [0, 2, 15_000], [1, 1, 5], [2, 0, 4]])
    part = Confusion("Confusion matrix", ["a", "b", "(none)"], ["a", "b", "(missed)"], cells)
    page = html_parts.section(part, html_parts.Room())
    found = re.findall(r'<td(?: style="background:(.*?)")?>([^<]*)</td>', page.split("<h3>")[0])[1:]
    blue, orange = "rgba(37,99,235,{})", "rgba(217,70,12,{})"
    assert found == [
        (blue.format("0.31"), "15k"), ("", ""), (orange.format("0.31"), "15k"),
        ("", ""), (blue.format("0.56"), "5"), ("", ""),
        (orange.format("0.56"), "4"), ("", ""), ("", ""),
    ]  # fmt: skip
    frequent = re.findall("<td[^>]*>(.*?)</td>", page.split("<h3>")[1])
    assert frequent == ["a", "(missed)", "15,000", "50.0%"]  # what is no class is left out


def test_pictures_are_bounded():
    noise = np.random.default_rng(0).integers(0, 255, (300, 400, 3), np.uint8)
    gallery = Gallery("Worst", [Picture([("a", noise), ("b", noise)], ["c"])] * 4)
    size = len(html_parts._encode(noise)[1])
    page = html_parts.section(gallery, html_parts.Room(5 * size))
    assert page.count("<img") == 4
    assert "2 more pictures are left out" in page
    kind, _, shape = html_parts._encode(noise[:8, :6])
    assert (kind, shape) == ("png", (150, 200))  # small ones are enlarged, without loss


def test_time_of_a_run_that_was_resumed():
    lines = [
        {"step": 10, "train/images_per_second": 5.0}, {"step": 10, "val/top1": 1.0},
        {"step": 30, "train/images_per_second": 2.0}, {"step": 40, "train/images_per_second": 0.0},
    ]  # fmt: skip
    assert html_report.training_seconds(lines, 2) == 10 * 2 / 5 + 20 * 2 / 2
    said = [html_report.duration(seconds) for seconds in (4.4, 64, 3600 * 30 + 59)]
    assert said == ["4 s", "1 min 4 s", "30 h 0 min"]


def test_a_page_is_written_whole(tmp_path):
    path = tmp_path / "report.html"
    html_report.write(path, "old")
    html_report.write(path, "name with a byte that is no text: \udcff")
    assert path.read_text() == "name with a byte that is no text: ?"
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(IsADirectoryError):
        html_report.write(tmp_path, "a folder")
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_a_picture_of_a_matrix_shows_what_is_more():
    """Of 1000 classes, four fifths of each right, the others taken for a neighbour."""
    count = 1000
    labels = np.arange(count)
    right = np.stack([labels, labels, np.full(count, 8)], 1)
    wrong = np.stack([labels, labels ^ 1, np.full(count, 2)], 1)
    names = [str(label) for label in labels]
    part = Confusion("Confusion matrix", names, names, np.concatenate([right, wrong]))
    page = html_parts.section(part, html_parts.Room())
    data = base64.b64decode(re.search('src="data:image/png;base64,(.*?)"', page)[1])
    pixels = np.asarray(Image.open(io.BytesIO(data)))
    diagonal = pixels[np.arange(len(pixels)), np.arange(len(pixels))]
    assert ((diagonal > 0) & (diagonal < 128)).all()
