"""What becomes of pictures that strangers send.

Refused before it costs anything, or PNG of 8 bits with nothing else in it.
"""

import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from edges.containers import MAX_PARTS, NotAContainer, take_apart
from edges.pictures import (
    MAX_JPEG_PIXELS,
    MAX_PIXELS,
    NotAPicture,
    fitted,
    fitted_mask,
    has_hole,
    normalise,
    selects,
)
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
def test_a_strange_picture_comes_out_plain(name):
    picture = normalise(HARMLESS[name])

    plain = decoded(picture.content)
    assert (plain.format, plain.mode, plain.size) == (
        "PNG",
        picture.mode,
        (picture.width_px, picture.height_px),
    )
    assert picture.mode in ("L", "RGB", "RGBA")
    assert not plain.info
    for rest in (SECRET, b"script", b"PK\x03\x04", b"Exif", b"ICC"):
        assert rest not in picture.content


@pytest.mark.parametrize("name", HOSTILE)
def test_content_that_is_no_picture_or_must_not_be_decoded_is_refused(name):
    with pytest.raises(NotAPicture):
        normalise(HOSTILE[name])


@settings(deadline=None)
@given(
    mode=st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA"]),
    width_px=st.integers(1, 40),
    height_px=st.integers(1, 40),
)
def test_a_lossless_picture_keeps_every_pixel(mode, width_px, height_px):
    picture = a_picture(width_px, height_px).convert(mode)

    kept = normalise(png(picture))

    assert kept.mode == {"1": "L", "P": "RGB", "LA": "RGBA"}.get(mode, mode)
    assert decoded(kept.content).tobytes() == picture.convert(kept.mode).tobytes()


@settings(deadline=None)
@given(name=st.sampled_from(sorted(HARMLESS)))
def test_a_normalised_picture_comes_out_the_same_again(name):
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

    assert (
        decoded(kept.content).tobytes()
        == ImageOps.exif_transpose(decoded(content)).convert("RGB").tobytes()
    )


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

    assert (
        decoded(normalise(png(half, icc_profile=swapped_profile())).content).getpixel((0, 0))[3]
        == 77
    )


def test_printers_colours_come_out_as_a_screen_shows_them():
    kept = decoded(normalise(encoded(a_picture(mode="CMYK"), "JPEG", quality=95)).content)

    assert np.abs(np.asarray(kept).astype(int) - np.asarray(a_picture())).mean() < 3


def test_a_picture_covers_the_size_it_is_fitted_to_and_its_middle_is_kept():
    stripes = Image.new("RGB", (300, 100), "white")
    stripes.paste((255, 0, 0), (100, 0, 200, 100))

    fit = fitted(png(stripes), 50, 50)

    assert fit.shape == (50, 50, 3)
    assert np.abs(fit.astype(int) - (255, 0, 0))[:, 3:-3].max() < 8


def test_transparent_pixels_are_white():
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


MARKERS = [
    bytes([0xFF, marker])
    for marker in (0x00, 0x01, 0xC0, 0xC4, 0xD0, 0xD8, 0xD9, 0xDA, 0xE1, 0xFE, 0xFF)
]
PREFIXES = [
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff",
    b"RIFF\xff\xff\xff\x7fWEBP",
    *(content[:64] for content in KINDLY.values()),
]
PIECES = [
    *MARKERS,
    b"\0",
    b"\0\2",
    b"\xff",
    b"\0\0\0\0IDAT\0\0\0\0",
    b"\0\0\0\0acTL",
    b"ANMF\0\0\0\0",
    b"EXIF\1\0\0\0M\0",
    b"MM\0*",
]


@settings(max_examples=60, deadline=None)
@given(
    prefix=st.sampled_from(PREFIXES),
    runs=st.lists(st.tuples(st.sampled_from(PIECES), st.integers(1, 4)), min_size=1, max_size=4),
    end=st.sampled_from([b"", b"\0" * 8, b"\xff\xd9", b"\0\0\0\0IEND\xaeB`\x82"]),
)
def test_taking_a_file_apart_takes_work_in_proportion_to_its_length(prefix, runs, end):
    """Lines of Python that are run: so many a part, of which there are so many.

    It does not matter how long the file is and what is repeated in it.
    """
    for scale in (1, 100, 3000):
        content = prefix + b"".join(piece * (count * scale) for piece, count in runs) + end

        assert _work_for(content) <= 20 * min(len(content), MAX_PARTS) + 1000


def _work_for(content: bytes) -> int:
    """What taking it apart comes to: lines that are run."""
    lines = 0

    def count(frame, event, _):
        nonlocal lines
        lines += event == "line"
        return count

    sys.settrace(count)
    try:
        take_apart(content)
    except NotAContainer:
        pass
    finally:
        sys.settrace(None)
    return lines


@pytest.mark.parametrize("run", [*MARKERS, b"\xff\xff\xff"])
@pytest.mark.parametrize("end", [b"\0" * 8, b"\xff\xd9", b""])
def test_a_search_for_markers_does_not_go_over_a_run_again(run, end):
    """Eight megabytes of one run take some 0.2 s.

    A search that looks ahead at every place takes hours.
    """
    began = time.process_time()

    with pytest.raises(NotAPicture):
        normalise(b"\xff\xd8\xff" + run * (8_000_000 // len(run)) + end)

    assert time.process_time() - began < 20


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_sees_no_metadata(kind):
    content = encoded(
        a_picture(),
        kind,
        exif=SECRET * 9,
        xmp=b"<x:xmpmeta>" + SECRET,
        icc_profile=swapped_profile(),
    )

    container = take_apart(content)

    assert container.profile == swapped_profile()
    assert SECRET not in container.essence
    assert container.profile not in container.essence
    assert len(container.essence) < len(content) - len(swapped_profile())


def test_a_profile_of_more_than_a_megabyte_counts_as_in_a_jpeg():
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    profile = swapped_profile() + np.random.default_rng(0).bytes(1_600_000)

    kept = [
        decoded(normalise(encoded(red, kind, icc_profile=profile)).content).getpixel((4, 4))
        for kind in ("PNG", "JPEG")
    ]

    assert [green > 240 > red for red, green, _ in kept] == [True, True]


@pytest.mark.parametrize(
    ("width_px", "height_px", "kept"),
    [(5712, 4284, (2856, 2142)), (6048, 8064, (3024, 4032)), (4000, 3000, (4000, 3000))],
)
def test_a_photograph_that_is_too_large_is_scaled_down(width_px, height_px, kept):
    ramp = Image.linear_gradient("L").resize((width_px, height_px))

    picture = normalise(encoded(ramp, "JPEG", quality=60))

    assert (picture.width_px, picture.height_px) == kept
    assert kept[0] * kept[1] <= MAX_PIXELS < MAX_JPEG_PIXELS
    small = np.asarray(decoded(picture.content).resize((8, 8)))
    assert np.abs(small.astype(int) - np.asarray(ramp.resize((8, 8)))).max() < 8


def test_a_large_photograph_is_upright_too():
    exif = Image.Exif()
    exif[0x0112] = 6

    picture = normalise(encoded(Image.new("L", (8064, 6048)), "JPEG", exif=exif.tobytes()))

    assert (picture.width_px, picture.height_px) == (3024, 4032)


def halves(mode="L", *, alpha=255) -> Image.Image:
    """A mask whose left half is white, in any mode."""
    mask = Image.new("L", (80, 40), 0)
    mask.paste(255, (0, 0, 40, 40))
    picture = mask.convert(mode)
    if mode == "RGBA":
        picture.putalpha(alpha)
    return picture


@pytest.mark.parametrize("alpha", [0, 1, 100, 254, 255])
def test_an_alpha_that_is_the_same_everywhere_says_nothing(alpha):
    assert (
        fitted_mask(png(halves("RGBA", alpha=alpha)), 40, 20) == fitted_mask(png(halves()), 40, 20)
    ).all()


def test_a_few_faint_pixels_do_not_turn_a_mask_into_another():
    mask = halves("RGBA")
    for place in range(30):
        mask.putpixel((place, place), (255, 255, 255, 250 - place))

    assert (fitted_mask(png(mask), 40, 20) == fitted_mask(png(halves()), 40, 20)).all()


def test_a_mask_that_is_transparent_all_over_repaints_all():
    assert fitted_mask(png(Image.new("RGBA", (8, 8))), 4, 4).all()


@pytest.mark.parametrize(
    ("mask", "does"),
    [
        (Image.new("L", (80, 40), 0), False),
        (Image.new("RGBA", (80, 40), (0, 0, 0, 254)), False),
        (Image.new("L", (80, 40), 127), False),
        (halves(), True),
        (halves("RGBA", alpha=254), True),
    ],
)
def test_a_mask_selects_something_or_not(mask, does):
    assert selects(png(mask), 40, 20) is does


def test_a_hole_is_seen_and_a_faint_edge_is_none():
    picture = a_picture(80, 40).convert("RGBA")
    assert not has_hole(png(picture), 40, 20)
    assert not has_hole(png(a_picture(80, 40)), 40, 20)

    picture.putpixel((3, 3), (0, 0, 0, 0))
    assert not has_hole(png(picture), 20, 10)

    picture.paste((0, 0, 0, 0), (10, 10, 30, 30))
    assert has_hole(png(picture), 20, 10)
