"""Images that probably show nothing are marked and counted, and pictures are not."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import text

from models.database import transaction
from tasks.suspicion import Suspicion, suspicion_of
from tests.metrics import increases

RNG = np.random.default_rng(7)


def of(level: int, *, side: int = 128) -> np.ndarray:
    return np.full((side, side, 3), level, dtype=np.uint8)


def shape_on(background: int, foreground: int) -> np.ndarray:
    """A small square in a corner of one colour."""
    pixels = of(background, side=512)
    pixels[8:72, 8:72] = foreground
    return pixels


@pytest.mark.parametrize(
    ("pixels", "why"),
    [
        (of(0), Suspicion.BLACK),
        (of(5), Suspicion.BLACK),
        (of(255), Suspicion.WHITE),
        (of(128), Suspicion.FLAT),
        (RNG.integers(127, 130, (300, 200, 3), dtype=np.uint8), Suspicion.FLAT),
        (RNG.integers(0, 256, (512, 512, 3), dtype=np.uint8), Suspicion.NOISE),
        (RNG.normal(128, 40, (128, 128, 3)).clip(0, 255).astype(np.uint8), Suspicion.NOISE),
    ],
)
def test_one_colour_and_noise_are_suspect(pixels, why):
    assert suspicion_of(pixels) is why


@pytest.mark.parametrize("levels", [(0, 255), (255, 0), (128, 140), (0, 40)])
def test_picture_with_an_empty_middle_is_not(levels):
    assert suspicion_of(shape_on(*levels)) is None


@given(
    step=st.integers(2, 64),
    noise=st.floats(0, 15),
    side=st.sampled_from([(64, 64), (128, 512), (1024, 1024)]),
)
def test_grainy_picture_of_stripes_is_not(step, noise, side):
    height, width = side
    stripes = 40 + 160 * ((np.arange(width) // step) % 2)
    rows = np.broadcast_to(stripes, (height, width))[..., None]
    grain = np.random.default_rng(step).normal(0, noise, (height, width, 3))

    assert suspicion_of((rows + grain).clip(0, 255).astype(np.uint8)) is None


def rows_of(here, job) -> list:
    with transaction(here.database) as session:
        query = text("SELECT suspect FROM images WHERE job_id = :id ORDER BY index")
        return list(session.scalars(query, {"id": job.id}))


def rendered(here, job) -> None:
    thread = here.render(job)
    thread.join(timeout=60)
    assert not thread.is_alive()


def test_image_of_a_damaged_decoder_is_marked_counted_and_delivered(here):
    good = here.accept()
    with increases() as by_a_picture:
        rendered(here, good)
    decoder = here.engine._checkpoints["pocket@1"].family.decoder
    bias = decoder.conv_out.bias
    kept = bias.data.clone()
    bias.data.fill_(-1e4)  # as if every activation before it had overflowed
    try:
        job = here.accept(num_images=2)
        with increases() as by_none:
            rendered(here, job)
    finally:
        bias.data.copy_(kept)

    assert rows_of(here, good) == [None]
    assert rows_of(here, job) == ["black", "black"]
    assert here.row(job).state == "storing"
    assert not [name for name in by_a_picture if name.startswith("images_suspect")]
    assert by_none['images_suspect{model="pocket",why="black"}'] == 2
