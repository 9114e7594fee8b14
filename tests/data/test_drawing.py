"""Predictions as pictures: what can be read on which picture, and that nothing leaves it."""

import time

import numpy as np
import pytest
from PIL import Image

from vssd_jax.data import drawing

SIZES = ((1, 1), (16, 16), (1000, 1), (1, 1000), (100, 4000), (4000, 100), (427, 640))
NAMES = [
    "person",
    "père",
    "собака",
    "狗",
    "كلب",
    "😀",
    "a name that is far too long " * 9,
    "",
    "a\nb",
]


@pytest.fixture
def no_fonts(monkeypatch):
    """A computer without any font but Pillow's own, which has ASCII only."""
    monkeypatch.setattr(drawing, "font_files", lambda: ("",))


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def detections(height, width, count, classes=9):
    rng = np.random.default_rng(count)
    corners = rng.uniform(-0.1, 1.1, (count, 2, 2)) * [width, height]
    boxes = np.concatenate((corners.min(1), corners.max(1)), 1)
    return {
        "boxes": boxes,
        "labels": rng.integers(0, classes, count),
        "scores": rng.uniform(size=count),
    }


def rectangles(height, width, count):
    """Random boxes of at least a pixel inside a picture."""
    rng = np.random.default_rng(count)
    left, top = rng.integers(0, width, count), rng.integers(0, height, count)
    right = np.minimum(left + rng.integers(1, 200, count), width)
    bottom = np.minimum(top + rng.integers(1, 200, count), height)
    return [drawing.Rectangle(*map(int, b)) for b in zip(left, top, right, bottom, strict=True)]


def assert_apart(placements, bounds):
    cover = np.zeros(bounds[::-1], int)
    for placement in filter(None, placements):
        left, top, right, bottom = placement.rectangle
        assert 0 <= left < right <= bounds[0]
        assert 0 <= top < bottom <= bounds[1]
        cover[top:bottom, left:right] += 1
    assert cover.max() <= 1


# --- Colours --------------------------------------------------------------------------------------


def test_colors_differ_and_do_not_depend_on_their_number():
    colors = drawing.class_colors(150)
    assert colors.shape == (150, 3)
    assert colors.dtype == np.uint8
    assert len(np.unique(colors, axis=0)) == 150
    np.testing.assert_array_equal(drawing.class_colors(7), colors[:7])
    assert drawing.class_colors(0).shape == (0, 3)


def test_contrast_is_that_of_wcag():
    assert drawing.contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    assert drawing.contrast((9, 9, 9), (9, 9, 9)) == 1
    # The grey that is known as the lightest one with enough contrast on white.
    assert drawing.contrast((118, 118, 118), (255, 255, 255)) == pytest.approx(4.54, abs=0.005)


def test_text_has_contrast_with_every_class_color():
    assert all(drawing.contrast(c, drawing.ink(c)) >= 4.5 for c in drawing.class_colors(1000))


# --- Names and fonts ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "number", "expected"),
    [
        ("père", 3, "pere 3"),
        ("traffic light", 0, "traffic light 0"),
        ("собака", 3, "class 3"),
        ("狗 dog", 12, "dog 12"),
        ("狗-狗", 4, "class 4"),
        ("😀", None, "?"),
        ("ﬁne\n\x00x²", None, "fine x2"),
        ("\udcff", 5, "class 5"),
    ],
)
def test_readable_names(name, number, expected):
    assert drawing.readable_name(name, number) == expected


@pytest.mark.parametrize("name", ["собака", "狗", "كلب", "😀", "père", "\udcff"])
def test_names_that_no_font_has_are_replaced(name, no_fonts):
    assert drawing.shown_name(name, 3) == drawing.readable_name(name, 3)
    assert drawing.shown_name("plain - name!", 3) == "plain - name!"


def test_names_are_cleaned():
    assert drawing.shown_name("a\n \u200b b\x07", 3) == "a b"
    assert drawing.shown_name("", 3) == drawing.shown_name("\u200b", 3) == "class 3"


def test_a_font_is_known_to_have_a_character_by_its_glyph(monkeypatch):
    """matplotlib's DejaVu Sans has Cyrillic and no Chinese."""
    matplotlib = pytest.importorskip("matplotlib")
    font = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    monkeypatch.setattr(drawing, "font_files", lambda: ("no such font.ttf", font, ""))
    assert drawing.shown_name("собака", 3) == "собака"
    assert drawing.shown_name("狗", 3) == "class 3"
    assert drawing.shown_name("собака 狗", 3) == "class 3"


def test_the_last_font_is_pillows():
    assert drawing.font_files()[-1] == ""


def test_names_without_fonts_are_drawn_as_their_ascii_form(no_fonts):
    image, labels = noise(300, 300), np.zeros((300, 300), np.uint8)
    drawn = [drawing.draw_segmentation(image, labels, [name]) for name in ("狗", "class 0")]
    np.testing.assert_array_equal(*map(np.asarray, drawn))


# --- Labels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 60, 200])
@pytest.mark.parametrize("bounds", [(640, 480), (4000, 100), (60, 1500), (10, 10)])
def test_labels_are_inside_and_apart(bounds, count):
    boxes = rectangles(bounds[1], bounds[0], count)
    sizes = [[(60 + i % 50, 16), (20, 16)] for i in range(count)]
    placements = drawing.place_labels(boxes, sizes, bounds)
    assert len(placements) == count
    assert_apart(placements, bounds)
    for options, placement in zip(sizes, placements, strict=True):
        if placement is not None:
            left, top, right, bottom = placement.rectangle
            assert (right - left, bottom - top) == options[placement.choice]


def test_a_label_touches_its_box():
    boxes = rectangles(480, 640, 60)
    for box, placement in zip(
        boxes, drawing.place_labels(boxes, [[(60, 16)]] * 60, (640, 480)), strict=True
    ):
        if placement is not None:
            left, top, right, bottom = placement.rectangle
            assert left <= box.right
            assert box.left <= right
            assert top <= box.bottom
            assert box.top <= bottom


def test_labels_prefer_to_stand_above_and_fall_back_in_turn():
    box = drawing.Rectangle(100, 100, 300, 300)
    first, second = drawing.place_labels([box, box], [[(150, 20)]] * 2, (640, 480))
    assert first == (0, (100, 80, 250, 100))
    assert second == (0, (100, 100, 250, 120))
    # At the upper edge there is no place above.
    top = drawing.Rectangle(0, 0, 300, 300)
    assert drawing.place_labels([top], [[(150, 20)]], (640, 480)) == [(0, (0, 0, 150, 20))]
    # The whole picture is the box: only the number has a place beside the first label.
    small = drawing.Rectangle(0, 0, 50, 20)
    placements = drawing.place_labels([small] * 3, [[(40, 20), (10, 20)]] * 3, (50, 20))
    assert placements == [(0, (0, 0, 40, 20)), (1, (40, 0, 50, 20)), None]


def test_labels_leave_enough_of_the_picture_to_see():
    boxes = rectangles(480, 640, 60)
    sizes = [[(90, 16), (20, 16)]] * 60
    placements = drawing.place_labels(boxes, sizes, (640, 480), most_covered=0.1)
    assert_apart(placements, (640, 480))
    whole = sum(placement is not None and placement.choice == 0 for placement in placements)
    assert whole == int(0.1 * 640 * 480 / (90 * 16))


def test_a_label_does_not_hide_a_small_box():
    large, small = drawing.Rectangle(0, 0, 400, 400), drawing.Rectangle(5, 2, 25, 18)
    (placement, _) = drawing.place_labels([large, small], [[(100, 20)], [(10, 10)]], (400, 400))
    assert placement == (0, (300, 0, 400, 20))


# --- Pictures -------------------------------------------------------------------------------------


def test_text_grows_with_the_picture():
    sizes = [drawing.text_size(4 * k, 3 * k) for k in (50, 160, 400, 1000, 1500)]
    assert sizes == sorted(sizes)
    assert sizes[0] == 12  # pixels
    assert sizes[-1] == 4500 // 40 + (4500 % 40 > 20)
    plates = [
        drawing.draw_classification(noise(3 * k, 4 * k), ["dog"], [0.5]).height - 3 * k
        for k in (100, 400, 1000)
    ]
    assert plates[0] >= 12
    assert plates[0] < plates[1] < plates[2]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_pictures_of_any_size(height, width):
    image = noise(height, width)
    before = image.copy()
    found = detections(height, width, 7)
    masks = np.random.default_rng(0).uniform(size=(7, height, width)) < 0.5
    labels = (np.arange(height * width).reshape(height, width) % 9).astype(np.uint8)
    drawn = [
        drawing.draw_detections(image, **found, masks=list(masks), class_names=NAMES),
        drawing.draw_detections(image, **found, class_names=NAMES),
        drawing.draw_segmentation(image, labels, NAMES),
        drawing.draw_classification(image, NAMES, np.linspace(0.9, 0, len(NAMES))),
        drawing.draw_classification(image, [], []),
    ]
    np.testing.assert_array_equal(image, before)
    short, long = sorted((height, width))
    factor = max(1, min(-(-drawing.LEAST_SIDE // short), 2000 // long))
    for picture in drawn:
        assert picture.mode == "RGB"
        # The legend is not wider than the picture, or than the margins of a narrow one.
        assert picture.width == max(factor * width, drawing.LEAST_SIDE)
        assert picture.height >= factor * height


def test_large_pictures_take_less_than_three_seconds():
    image = np.zeros((4000, 6000, 3), np.uint8)
    found = detections(4000, 6000, 5)
    masks = [np.zeros((4000, 6000), bool) for _ in range(5)]
    for mask in masks:
        mask[500:3000, 1000:4000] = True
    labels = np.zeros((4000, 6000), np.uint8)
    labels[2000:] = 3
    drawing.font_files()
    start = time.process_time()  # others' load does not count
    drawing.draw_detections(image, **found, masks=masks, class_names=NAMES)
    middle = time.process_time()
    drawing.draw_segmentation(image, labels, NAMES)
    end = time.process_time()
    assert middle - start < 3
    assert end - middle < 3


def test_nothing_found_leaves_the_picture():
    image = noise(300, 400)
    nothing = {"boxes": np.zeros((0, 4)), "labels": [], "scores": []}
    picture = drawing.draw_detections(image, **nothing, masks=[], class_names=NAMES)
    np.testing.assert_array_equal(np.asarray(picture), image)


@pytest.mark.parametrize("value", [0, 128, 255])
def test_boxes_show_on_any_background(value):
    """Both the class's colour and its opposite are on the box."""
    image = np.full((300, 400, 3), value, np.uint8)
    for label in range(12):
        picture = drawing.draw_detections(
            image, boxes=np.array([[100, 100, 300, 200]]), labels=[label], scores=[1.0],
            class_names=[""] * 12,
        )  # fmt: skip
        column = np.asarray(picture)[150, 95:110].tolist()
        color = drawing.class_colors(12)[label]
        assert color.tolist() in column
        assert list(drawing.ink(color)) in column


def test_the_best_is_on_top_and_masks_have_their_color():
    image = np.full((300, 400, 3), 100, np.uint8)
    mask = np.zeros((300, 400), bool)
    mask[100:200, 100:300] = True
    boxes = np.array([[100, 100, 300, 200]] * 2)
    draw = {"boxes": boxes, "masks": [mask, mask], "class_names": ["", "", ""]}
    pictures = [
        np.asarray(drawing.draw_detections(image, labels=[0, 2], scores=scores, **draw))
        for scores in ([0.9, 0.8], [0.8, 0.9])
    ]
    colors = drawing.class_colors(3).astype(float)
    for picture, (under, over) in zip(pictures, ((2, 0), (0, 2)), strict=True):
        expected = 0.6 * (0.6 * 100 + 0.4 * colors[under]) + 0.4 * colors[over]
        assert np.abs(picture[150, 150] - expected).max() <= 2
        assert colors[over].tolist() in picture[150, 98:108].tolist()
        assert colors[under].tolist() not in picture[150, 98:108].tolist()
        np.testing.assert_array_equal(picture[250, 350], 100)


def test_labels_without_a_place_are_in_the_legend():
    image = noise(300, 300)
    boxes = np.array([[100, 100, 160, 130]] * 60)
    draw = {"boxes": boxes, "labels": [0] * 60, "class_names": ["chest of drawers"]}
    picture = drawing.draw_detections(image, scores=np.linspace(1, 0, 60), **draw)
    assert picture.height > 300
    less = drawing.draw_detections(image, scores=np.linspace(1, 0, 60), **draw, max_entries=5)
    assert 300 < less.height < picture.height
    long = drawing.draw_detections(
        image, boxes=boxes[:1], labels=[0], scores=[1], class_names=["a long name " * 20]
    )
    assert long.height > 300
    assert long.width == 300


def test_broken_boxes_are_drawn():
    boxes = np.array(
        [[np.nan] * 4, [np.inf, 0, np.inf, 5], [50, 50, 10, 10], [-90, -90, -50, -50], [9e9] * 4]
    )
    drawing.draw_detections(
        noise(300, 300), boxes=boxes, labels=[0, -1, 99999, 1, 2],
        scores=[np.nan, 1, 2, -1, 0], class_names=["a", "b"],
    )  # fmt: skip


def test_contradictory_detections_are_refused():
    image = noise(30, 40)
    with pytest.raises(ValueError, match="as many"):
        drawing.draw_detections(
            image, boxes=np.zeros((2, 4)), labels=[0], scores=[1, 1], class_names=[]
        )
    with pytest.raises(ValueError, match=r"\(40, 30\)"):
        drawing.draw_detections(
            image, boxes=np.zeros((1, 4)), labels=[0], scores=[1], class_names=[],
            masks=[np.zeros((40, 30), bool)],
        )  # fmt: skip


def test_segmentation_has_the_colors_of_the_classes_and_their_legend():
    image = np.full((30, 40, 3), 128, np.uint8)
    labels = np.zeros((30, 40), np.int32)
    labels[10:, 5:] = 2
    labels[:, :2] = 255
    picture = drawing.draw_segmentation(image, labels, ["sky", "sea", "chest of drawers", "flag"])
    factor = picture.width // 40
    pixels = np.asarray(picture).astype(int)
    colors = drawing.class_colors(4).astype(int)
    for row, column, label in ((20, 20, 2), (0, 39, 0)):
        found = pixels[row * factor, column * factor]
        assert np.abs(found - (0.45 * 128 + 0.55 * colors[label])).max() <= 1
    np.testing.assert_array_equal(pixels[0, 0], 128)  # no class
    legend = pixels[30 * factor :].reshape(-1, 3).tolist()
    assert [color in legend for color in colors.tolist()] == [True, False, True, False]


@pytest.mark.parametrize("width", [200, 640, 2000])
def test_many_classes_have_columns_and_a_rest(width):
    labels = (np.arange(300 * width).reshape(300, width) % 150).astype(np.uint8)
    names = [f"some class {i}" for i in range(150)]
    image = noise(300, width)
    few = drawing.draw_segmentation(image, labels, names, max_entries=10)
    every = drawing.draw_segmentation(image, labels, names, max_entries=150)
    assert few.width == every.width == width
    assert 300 < few.height < every.height
    # Wider pictures have more columns, and so less rows.
    assert every.height - 300 < 150 * 25 / {200: 1, 640: 3, 2000: 6}[width]


def test_a_thousand_classes():
    names = [f"class number {i}" for i in range(1000)]
    labels = np.arange(300 * 400).reshape(300, 400) % 1000
    picture = drawing.draw_segmentation(noise(300, 400), labels, names)
    colors = drawing.class_colors(1000).astype(float)
    flat = drawing.draw_segmentation(np.zeros((300, 400, 3), np.uint8), labels, names)
    assert picture.size == flat.size
    for label in (0, 256, 399, 254):
        assert np.abs(np.asarray(flat)[0, label] - 0.55 * colors[label]).max() <= 1
    drawing.draw_detections(
        noise(300, 400), **detections(300, 400, 60, classes=1000), class_names=names
    )


def test_long_names_of_classification_are_wrapped_and_cut():
    image = noise(300, 300)
    short, long, longest = (
        drawing.draw_classification(image, ["word " * count], [0.5]) for count in (1, 12, 200)
    )
    assert short.height < long.height == longest.height
    assert short.width == long.width == longest.width == 300


@pytest.mark.parametrize("count", [1, 4, 23, 200])
def test_contact_sheets_of_any_number_of_pictures(count):
    rng = np.random.default_rng(0)
    pictures = [
        (noise(*rng.integers(1, 90, 2)), [NAMES[i % len(NAMES)], "50%"][: i % 3])
        for i in range(count)
    ]
    pictures[0] = (Image.new("RGBA", (300, 30), "red"), ["red"])
    sheet = np.asarray(drawing.contact_sheet(pictures, columns=5, tile=40))
    columns = min(count, 5)
    assert 40 * columns < sheet.shape[1] < 60 * columns + 20
    assert sheet.shape[0] > 15 * -(-count // 5)
    assert len(np.unique(sheet[0, 0])) == 1  # grey
    assert [255, 0, 0] in sheet.reshape(-1, 3).tolist()
    for edge in (sheet[:2], sheet[:, :2], sheet[-2:], sheet[:, -2:]):
        assert (edge == sheet[0, 0]).all()


def test_thumbnails_keep_their_proportions():
    red = np.zeros((50, 200, 3), np.uint8)
    red[..., 0] = 255
    sheet = np.asarray(drawing.contact_sheet([(red, ())], tile=100)).astype(int)
    rows, columns = np.nonzero((sheet == [255, 0, 0]).all(-1))
    assert np.ptp(rows) + 1 == 25
    assert np.ptp(columns) + 1 == 100


def test_a_contact_sheet_needs_a_picture():
    with pytest.raises(ValueError, match="needs a picture"):
        drawing.contact_sheet([])
