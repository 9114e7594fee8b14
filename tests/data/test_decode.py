import io

import cv2
import numpy as np
import pytest
from PIL import Image

from vssd_jax.data.decode import MAX_CONSECUTIVE_UNREADABLE, DecodedSource, UnreadableImage, decode
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


def test_nothing_readable_is_the_users_error():
    with pytest.raises(UserError, match="10 pictures in a row"):
        DecodedSource(records(damaged=set(range(10))))[4]
    many = [{"image": b"", "label": 0}] * (MAX_CONSECUTIVE_UNREADABLE + 50)
    with pytest.raises(UserError, match="100 pictures in a row cannot be read, from number 7"):
        DecodedSource(many)[7]
