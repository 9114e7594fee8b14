import numpy as np
import pytest

from vssd_jax.data.heat_maps import Tile, draw_heat_maps, viridis

GREY = (224, 224, 224)


def test_viridis_against_matplotlib():
    matplotlib = pytest.importorskip("matplotlib")
    values = np.linspace(0, 1, 101)
    expected = 255 * matplotlib.colormaps["viridis"](values)[:, :3]
    assert abs(viridis(values) - expected).max() < 8
    luminance = viridis(values) @ (0.299, 0.587, 0.114)
    assert (np.diff(luminance) > -0.6).all()  # roundings
    np.testing.assert_array_equal(viridis([-1.0, 2.0, np.nan]), viridis([0.0, 1.0, 0.0]))


def part(sheet, number, columns=5, tile=64, gap=12):
    """The pixels of a tile of a contact sheet, without its captions."""
    x = gap + number * (tile + gap)
    return np.asarray(sheet)[gap : gap + tile, x : x + tile]


def test_a_cell_is_the_colour_of_its_number_at_its_place():
    values = np.array([[0.0, 1.0], [2.0, 4.0]])
    sheet = draw_heat_maps(None, [Tile(values, cell=29)], tile=64)
    tile = part(sheet, 0)  # 58 pixels, then the bar of 2 and its gap
    for (row, column), value in np.ndenumerate(values):
        assert (tile[15 + 29 * row, 15 + 29 * column] == viridis(value / 4)).all()
    assert (tile[61] == tile[60]).all()
    assert (tile[61, 0] == viridis(0.0)).all()
    assert (tile[61, 57] == viridis(1.0)).all()
    assert (tile[58, :58] == GREY).all()


def test_cells_beyond_the_picture_are_cut_off_and_it_shows_through():
    image = np.zeros((50, 60, 3), np.uint8)
    image[:, 30:] = 255
    values = np.array([[0.0, 1.0]])
    plain = draw_heat_maps(image, [Tile(values, cell=32)], tile=64)
    over = draw_heat_maps(image, [Tile(values, cell=32, over=True)], tile=64)
    tile = part(plain, 1)
    assert (tile[5, 31] == viridis(0.0)).all()
    assert (tile[5, 32] == viridis(1.0)).all()
    assert (tile[5, 60] == GREY).all()
    assert (tile[31, 59] == viridis(1.0)).all()
    assert (tile[32, 59] == GREY).all()  # no cell
    shown = part(over, 1)[5, [29, 30, 32]].astype(float)
    np.testing.assert_allclose(shown[0], 0.7 * viridis(0.0), atol=1)
    np.testing.assert_allclose(shown[1], 0.7 * viridis(0.0) + 0.3 * 255, atol=1)
    np.testing.assert_allclose(shown[2], 0.7 * viridis(1.0) + 0.3 * 255, atol=1)


def test_logarithms_ends_and_what_is_not_finite():
    values = np.array([[1e-9, 0.01, 0.1, 1.0]])
    tile = part(draw_heat_maps(None, [Tile(values, cell=16, decades=2)], tile=64), 0)
    expected = viridis(np.array([0, 0, 0.5, 1]))
    np.testing.assert_array_equal(tile[3, 8::16], expected)
    fixed = part(draw_heat_maps(None, [Tile(values, cell=16, low=-1.0, high=3.0)], tile=64), 0)
    np.testing.assert_array_equal(fixed[3, 8::16], viridis((values[0] + 1) / 4))
    for same in (np.ones((2, 2)), np.full((2, 2), np.nan), np.zeros((2, 2))):
        for decades in (None, 3):
            tile = part(draw_heat_maps(None, [Tile(same, cell=29, decades=decades)], tile=64), 0)
            assert (tile[:58, :58] == tile[0, 0]).all()


def test_a_mark_is_drawn_on_the_picture_and_its_maps():
    image = np.zeros((64, 64, 3), np.uint8)
    sheet = draw_heat_maps(image, [Tile(np.zeros((2, 2)), cell=32)], mark=(32, 0, 64, 32), tile=70)
    red = (np.asarray(sheet) == (255, 0, 0)).all(-1)
    frame = np.zeros((64, 64), bool)
    frame[0:32, 32:64] = True
    frame[1:31, 33:63] = False
    # The picture stands at the bottom of its row, which is higher by a bar of 3 and its gap.
    np.testing.assert_array_equal(red[18:82, 12:76], frame)
    np.testing.assert_array_equal(red[12:76, 94:158], frame)
    assert red.sum() == 2 * frame.sum()


def test_a_map_of_one_value_and_cells_that_are_not_finite():
    tile = part(draw_heat_maps(None, [Tile(np.ones((2, 2)), cell=29)], tile=64), 0)
    assert (tile[5, 5] == viridis(0.5)).all()
    broken = np.array([[0.0, np.nan], [np.inf, 1.0]])
    tile = part(draw_heat_maps(None, [Tile(broken, cell=29)], tile=64), 0)
    assert (tile[15, 15] == viridis(0.0)).all()
    assert (tile[44, 44] == viridis(1.0)).all()
    assert (tile[15, 44] == 128).all()
    assert (tile[44, 15] == 128).all()
