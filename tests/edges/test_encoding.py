"""Pixels to bytes: exact where the format can be, and the same every time."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from edges.encoding import OPTIONS, encode
from policy.formats import FORMATS
from tests.builders import some_pixels


def decoded(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def test_every_format_that_clients_may_ask_for_can_be_made():
    assert set(OPTIONS) == set(FORMATS)


@pytest.mark.parametrize("output_format", ["png", "webp"])
@given(width_px=st.integers(1, 70), height_px=st.integers(1, 70), seed=st.integers(0, 9))
def test_lossless_formats_keep_every_pixel(output_format, width_px, height_px, seed):
    pixels = some_pixels(width_px, height_px, seed)

    assert np.array_equal(decoded(encode(pixels, output_format)), pixels)


def test_jpeg_keeps_the_picture():
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    pixels = np.stack(
        [np.tile(ramp, (64, 1)), np.tile(ramp[:, None], (1, 64)), np.full((64, 64), 90, np.uint8)],
        axis=-1,
    )

    difference = np.abs(decoded(encode(pixels, "jpeg")).astype(int) - pixels)

    assert (difference.mean() < 2, difference.max() < 16) == (True, True)


@pytest.mark.parametrize("output_format", list(FORMATS))
def test_the_same_pixels_are_the_same_bytes(output_format):
    assert encode(some_pixels(seed=3), output_format) == encode(some_pixels(seed=3), output_format)


@pytest.mark.parametrize("output_format", list(FORMATS))
def test_the_bytes_are_what_the_content_type_says_and_carry_no_metadata(output_format):
    image = Image.open(io.BytesIO(encode(some_pixels(24, 16), output_format)))

    assert Image.MIME[image.format] == FORMATS[output_format].content_type
    assert image.size == (24, 16)
    assert not image.getexif()
    assert not {"comment", "xmp", "Software"} & set(image.info)


def test_pixels_need_not_be_contiguous():
    pixels = some_pixels()[::2, ::-1]

    assert np.array_equal(decoded(encode(pixels, "png")), pixels)


def test_an_unknown_format_is_a_key_error():
    with pytest.raises(KeyError):
        encode(some_pixels(), "gif")
