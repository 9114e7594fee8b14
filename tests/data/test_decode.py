import io
import pathlib
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from vssd_jax.data.decode import (
    MAX_CONSECUTIVE_UNREADABLE,
    MAX_PIXELS,
    DecodedSource,
    UnreadableImage,
    decode,
    decode_annotated,
)
from vssd_jax.errors import UserError


def picture(height=45, width=60, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pillow(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def cmyk():
    return Image.merge("CMYK", [picture(seed=s).getchannel(0) for s in range(4)])


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(encode(picture(), "JPEG", quality=92, subsampling=2), id="4:2:0"),
        pytest.param(encode(picture(), "JPEG", quality=92, subsampling=0), id="4:4:4"),
        pytest.param(encode(picture(), "JPEG", progressive=True), id="progressive"),
        pytest.param(encode(picture(), "JPEG", keep_rgb=True), id="JPEG of RGB, not YCbCr"),
        pytest.param(encode(picture().convert("L"), "JPEG"), id="greyscale"),
        pytest.param(encode(cmyk(), "JPEG"), id="CMYK, inverted by Adobe's rule"),
        pytest.param(encode(picture(), "JPEG", exif=exif(6)), id="EXIF orientation ignored"),
        pytest.param(encode(picture(), "JPEG") + bytes(1000), id="trailing bytes"),
        pytest.param(encode(picture(), "PNG"), id="PNG"),
        pytest.param(encode(picture().quantize(16), "PNG"), id="palette"),
        pytest.param(
            encode(picture().quantize(16), "PNG", transparency=bytes(range(0, 256, 16))),
            id="palette with transparency",
        ),
        pytest.param(encode(picture().convert("RGBA"), "PNG"), id="alpha"),
        pytest.param(encode(picture().convert("1"), "PNG"), id="one bit"),
        pytest.param(encode(picture(), "GIF"), id="GIF"),
        pytest.param(encode(picture(), "BMP"), id="BMP"),
    ],
)
@pytest.mark.filterwarnings("ignore:Palette images:UserWarning")  # of Pillow's side
def test_equals_pillow(data):
    expected = pillow(data)
    result = decode(data)
    assert result.dtype == np.uint8
    assert result.shape == expected.shape
    assert np.abs(result - expected).max() <= 1


def test_opencv_takes_the_common_jpegs(monkeypatch):
    """The fast way is taken where it should be, and only there."""
    monkeypatch.setattr(Image, "open", None)
    for options in ({}, {"progressive": True}, {"exif": exif(3)}, {"subsampling": 0}):
        decode(encode(picture(), "JPEG", **options))
    decode(encode(picture().convert("L"), "JPEG"))
    for data in (encode(cmyk(), "JPEG"), encode(picture(), "PNG"), encode(picture(), "JPEG")[:-2]):
        with pytest.raises(UnreadableImage, match="NoneType"):
            decode(data)


def test_palette_with_transparency_warns_of_nothing():
    data = encode(picture().quantize(16), "PNG", transparency=bytes(range(0, 256, 16)))
    assert decode(data).shape == (45, 60, 3)


def test_cmyk_shows_the_colours_of_the_original():
    # Pure cyan ink: no red at all.
    image = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    red, green, blue = decode(encode(image, "JPEG"))[8, 8].astype(int)
    assert red < 8
    assert green > 247
    assert blue > 247


def test_16_bit_keeps_the_high_byte():
    values = np.random.default_rng(0).integers(0, 65536, (20, 30), dtype=np.uint16)
    grey = decode(encode(Image.fromarray(values), "PNG"))
    np.testing.assert_array_equal(grey, np.repeat((values >> 8)[..., None], 3, axis=2))
    values = np.random.default_rng(0).integers(0, 65536, (20, 30, 3), dtype=np.uint16)
    colour = decode(cv2.imencode(".png", values[..., ::-1])[1].tobytes())
    np.testing.assert_array_equal(colour, values >> 8)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation(orientation, kind):
    options = {} if kind == "TIFF" else {"quality": 95}
    data = encode(picture(), kind, exif=exif(orientation), **options)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    result = decode(data, oriented=True)
    assert result.shape == upright.shape
    assert np.abs(result - upright.astype(int)).max() <= 1
    if kind != "TIFF":  # Pillow turns a TIFF by itself
        assert decode(data).shape == (45, 60, 3)


def test_annotations_decide_between_stored_and_upright_pixels():
    data = encode(picture(), "JPEG", exif=exif(6))  # 60 x 45 as it is stored, 45 x 60 upright
    stored, upright = decode(data), decode(data, oriented=True)
    np.testing.assert_array_equal(decode_annotated(data, (60, 45)), upright)
    np.testing.assert_array_equal(decode_annotated(data, (45, 60)), stored)
    np.testing.assert_array_equal(decode_annotated(data, (7, 9)), upright)
    square = encode(picture(50, 50), "JPEG", exif=exif(3))
    np.testing.assert_array_equal(decode_annotated(square, (50, 50)), decode(square)[::-1, ::-1])


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_the_depth_is_that_of_the_values(bits):
    values = np.random.default_rng(0).integers(0, 2**bits, (20, 30), dtype=np.uint16)
    values[0, 0] = 2**bits - 1
    upper = np.repeat((values >> (bits - 8))[..., None], 3, axis=2)
    colour = np.stack([values, values[::-1], values[:, ::-1]], axis=2)
    files = {
        "grey PNG": Image.fromarray(values),
        "grey TIFF": Image.fromarray(values),
        "32 bits TIFF": Image.fromarray(values.astype(np.int32)),
    }
    for name, image in files.items():
        np.testing.assert_array_equal(decode(encode(image, name.split()[-1])), upper, name)
    png = cv2.imencode(".png", colour[..., ::-1])[1].tobytes()
    np.testing.assert_array_equal(decode(png), colour >> (bits - 8))
    alpha = np.dstack([colour[..., ::-1], np.full_like(values, 65535)])
    png = cv2.imencode(".png", alpha)[1].tobytes()
    assert decode(png).max() == 255


def test_floats_are_shares_or_values():
    shares = np.linspace(0, 1, 600, dtype=np.float32).reshape(20, 30)
    expected = (shares * 255).astype(np.uint8)
    for values in (shares, shares * 255):
        values[3, 3] = np.nan
        result = decode(encode(Image.fromarray(values), "TIFF"))[..., 0]
        assert result[3, 3] == 0
        result[3, 3] = expected[3, 3]
        assert np.abs(result - expected.astype(int)).max() <= 1


def test_deep_pictures_are_turned_too():
    values = np.arange(600, dtype=np.uint16).reshape(20, 30) * 100
    data = encode(Image.fromarray(values), "PNG", exif=exif(6))
    np.testing.assert_array_equal(decode(data, oriented=True), np.rot90(decode(data), -1))


def test_pixels_are_limited_before_anything_is_decoded(monkeypatch):
    # A header that claims 32767 x 32767 pixels, of a file of a few hundred bytes.
    jpeg = bytearray(encode(picture(), "JPEG"))
    start = jpeg.index(b"\xff\xc0")
    jpeg[start + 5 : start + 9] = (32767).to_bytes(2) * 2
    png = bytearray(encode(picture(), "PNG"))
    png[16:24] = (20000).to_bytes(4) * 2
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4)
    monkeypatch.setattr(Image.Image, "load", None)
    for data in (jpeg, jpeg[:-2], png):
        with pytest.raises(UnreadableImage, match=r"pixels .*than config\.max_pixels"):
            decode(bytes(data))
    monkeypatch.undo()
    for kind in ("JPEG", "PNG"):
        data = encode(picture(), kind)
        assert decode(data, max_pixels=2700).shape == (45, 60, 3)
        with pytest.raises(UnreadableImage, match="60x45 pixels are more than"):
            decode(data, max_pixels=2699)


def test_a_limit_above_pillows_is_used():
    before = Image.MAX_IMAGE_PIXELS
    try:
        Image.MAX_IMAGE_PIXELS = 1000
        data = encode(picture(), "PNG")  # 2700 pixels, which Pillow would refuse
        assert decode(data, max_pixels=MAX_PIXELS).shape == (45, 60, 3)
    finally:
        Image.MAX_IMAGE_PIXELS = before


def test_only_picture_formats_are_opened():
    for data in (encode(picture(), "EPS"), encode(picture(), "PDF"), encode(picture(), "TGA")):
        with pytest.raises(UnreadableImage, match="no known picture format"):
            decode(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(500),
        b"no picture at all" * 20,
        b"\xff\xd8",
        encode(picture(), "JPEG")[:-2],
        encode(picture(), "JPEG")[:700],
        encode(picture(), "JPEG", progressive=True)[:-40],
        encode(picture().convert("L"), "JPEG")[:-5],
        encode(cmyk(), "JPEG")[:-300],
        encode(picture(), "PNG")[:-300],
        encode(picture(), "PNG")[:30],
    ],
)
def test_unreadable(data):
    with pytest.raises(UnreadableImage):
        decode(data)


def records(damaged, n=10):
    return [
        {"image": b"" if i in damaged else encode(picture(seed=i), "PNG"), "label": i}
        for i in range(n)
    ]


def test_unreadable_pictures_are_replaced_by_the_next():
    source = DecodedSource(records(damaged={3, 7, 8, 9}))
    assert len(source) == 10
    labels = [int(source[i]["label"]) for i in range(10)]
    assert labels == [0, 1, 2, 4, 4, 5, 6, 0, 0, 0]
    assert [int(source[i]["replaced"]) for i in range(10)] == [0, 0, 0, 1, 0, 0, 0, 1, 1, 1]
    for i, label in enumerate(labels):
        np.testing.assert_array_equal(source[i]["image"], np.asarray(picture(seed=label)))


def test_annotated_pictures_keep_their_fields(capfd):
    size = (60, 45)
    good = {"image": encode(picture(), "JPEG", exif=exif(6)), "size": size, "boxes": 5, "index": 1}
    source = DecodedSource([{**good, "image": b"", "name": "a.jpg", "index": 0}, good])
    element = source[0]
    assert {**element, "image": element["image"].shape} == {
        "image": (60, 45, 3), "size": size, "boxes": 5, "index": 0, "replaced": 1,
    }  # fmt: skip
    wrong = [{"image": good["image"], "size": (45, 61), "name": "b.jpg"}]
    with pytest.raises(UserError, match=r"b.jpg is 45x60 pixels, .* 61x45; correct them"):
        DecodedSource(wrong)[0]


class Missing(list):
    def __getitem__(self, index):
        return {"image": pathlib.Path("nowhere.jpg").read_bytes()}


def test_unreadable_pictures_are_named_a_few_times(monkeypatch, capfd):
    monkeypatch.setattr("vssd_jax.data.decode._named", 0)
    with pytest.raises(UserError):
        DecodedSource(Missing("abcde"))[0]
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "No such file or directory: 'nowhere.jpg'" in lines[0]
    assert "further ones are only counted" in lines[2]


def test_nothing_readable_is_the_users_error():
    with pytest.raises(UserError, match="10 pictures in a row"):
        DecodedSource(records(damaged=set(range(10))))[4]
    many = [{"image": b"", "label": 0}] * (MAX_CONSECUTIVE_UNREADABLE + 50)
    with pytest.raises(UserError, match="100 pictures in a row cannot be read, from number 7"):
        DecodedSource(many)[7]
