"""What becomes of pictures that strangers send: refused before it costs anything, or PNG of 8 bits with nothing else in it."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from edges import pictures
from edges.pictures import NotAPicture, TooBusy, fitted, fitted_mask, normalise
from tests.pictures import (
    KINDS,
    SECRET,
    a_picture,
    decoded,
    encoded,
    grey_of_16_bits,
    harmless,
    hostile,
    lines,
    png,
    raw_png,
    swapped_profile,
    turned,
)

HARMLESS, HOSTILE = dict(harmless()), dict(hostile())
KINDLY = {kind: encoded(a_picture(), kind) for kind in KINDS}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_strange_and_a_picture_comes_out_plain(name):
    picture = normalise(HARMLESS[name])

    plain = decoded(picture.content)
    assert (plain.format, plain.mode, plain.size) == ("PNG", picture.mode, (picture.width_px, picture.height_px))
    assert picture.mode in ("L", "RGB", "RGBA")
    assert not plain.info
    for rest in (SECRET, b"script", b"PK\x03\x04", b"Exif", b"ICC"):
        assert rest not in picture.content


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_picture_or_must_not_be_decoded_is_refused(name):
    with pytest.raises(NotAPicture):
        normalise(HOSTILE[name])


@settings(deadline=None)
@given(mode=st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA"]), width_px=st.integers(1, 40), height_px=st.integers(1, 40))
def test_what_is_lossless_keeps_every_pixel(mode, width_px, height_px):
    picture = a_picture(width_px, height_px).convert(mode)

    kept = normalise(png(picture))

    assert kept.mode == {"1": "L", "P": "RGB", "LA": "RGBA"}.get(mode, mode)
    assert decoded(kept.content).tobytes() == picture.convert(kept.mode).tobytes()


@settings(deadline=None)
@given(name=st.sampled_from(sorted(HARMLESS)))
def test_what_came_out_once_comes_out_the_same_again(name):
    once = normalise(HARMLESS[name])

    assert normalise(once.content) == once


@settings(max_examples=300, deadline=None)
@given(data=st.data(), kind=st.sampled_from(KINDS))
def test_a_file_that_is_cut_off_anywhere_is_refused(data, kind):
    content = KINDLY[kind]

    with pytest.raises(NotAPicture):
        normalise(content[: data.draw(st.integers(0, len(content) - 1))])


@settings(max_examples=500, deadline=None)
@given(data=st.data(), kind=st.sampled_from(KINDS))
def test_whatever_the_bytes_it_is_a_picture_or_refused(data, kind):
    content = bytearray(KINDLY[kind])
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))

    try:
        picture = normalise(bytes(content))
    except NotAPicture:
        return
    assert decoded(picture.content).size == (picture.width_px, picture.height_px)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_is_upright_whichever_way_the_camera_was_held(kind, orientation):
    content = turned(kind, orientation)

    kept = normalise(content)

    assert decoded(kept.content).tobytes() == ImageOps.exif_transpose(decoded(content)).convert("RGB").tobytes()


def test_16_bits_are_scaled_and_not_cut_off():
    grey = grey_of_16_bits()

    kept = np.asarray(decoded(normalise(raw_png(96, 64, lines(grey), bits=16)).content))

    assert (kept.min(), kept.max()) == (0, 255)
    assert np.abs(kept - grey / 257).max() <= 0.5 + 1e-9


def test_colours_are_those_that_the_profile_means():
    red = Image.new("RGB", (8, 8), (255, 0, 0))

    kept = decoded(normalise(png(red, icc_profile=swapped_profile())).content)

    red_part, green_part, blue_part = kept.getpixel((0, 0))
    assert (red_part < 10, green_part > 245, blue_part < 10) == (True, True, True)


def test_transparency_outlives_a_profile():
    half = Image.new("RGBA", (8, 8), (255, 0, 0, 77))

    assert decoded(normalise(png(half, icc_profile=swapped_profile())).content).getpixel((0, 0))[3] == 77


def test_printers_colours_come_out_as_a_screen_shows_them():
    kept = decoded(normalise(encoded(a_picture(mode="CMYK"), "JPEG", quality=95)).content)

    assert np.abs(np.asarray(kept).astype(int) - np.asarray(a_picture())).mean() < 3


def test_more_than_a_few_at_once_wait_and_then_are_told_to_come_later(monkeypatch):
    monkeypatch.setattr(pictures, "WAIT_S", 0.05)
    with pictures._turn(), pictures._turn(), pytest.raises(TooBusy):
        normalise(png())

    assert normalise(png()).mode == "RGB"


def test_a_file_is_read_only_when_its_turn_has_come(monkeypatch):
    monkeypatch.setattr(pictures, "WAIT_S", 0.05)
    file = io.BytesIO(png())

    with pictures._turn(), pictures._turn(), pytest.raises(TooBusy):
        normalise(file)

    assert file.tell() == 0
    assert normalise(file) == normalise(png())


def test_a_picture_covers_the_size_it_is_fitted_to_and_its_middle_is_kept():
    stripes = Image.new("RGB", (300, 100), "white")
    stripes.paste((255, 0, 0), (100, 0, 200, 100))

    fit = fitted(png(stripes), 50, 50)

    assert fit.shape == (50, 50, 3)
    assert np.abs(fit.astype(int) - (255, 0, 0))[:, 3:-3].max() < 8


def test_what_is_transparent_is_white():
    assert (fitted(png(Image.new("RGBA", (9, 9), (255, 0, 0, 0))), 4, 4) == 255).all()


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA"])
def test_a_mask_is_white_where_it_is_to_be_repainted(mode):
    mask = Image.new("L", (80, 40), 0)
    mask.paste(255, (0, 0, 40, 40))

    fit = fitted_mask(normalise(png(mask.convert(mode))).content, 40, 20)

    assert fit.shape == (20, 40)
    assert (fit[:, :20] == 255).all()
    assert (fit[:, 20:] == 0).all()


def test_a_mask_with_transparency_is_transparent_where_it_is_to_be_repainted():
    mask = Image.new("RGBA", (80, 40), (255, 255, 255, 255))
    mask.paste((255, 255, 255, 0), (0, 0, 40, 40))

    fit = fitted_mask(png(mask), 40, 20)

    assert (fit[:, :20] == 255).all()
    assert (fit[:, 20:] == 0).all()
