"""The checker must believe every true picture and catch every lie."""

import random
import subprocess
import sys

import numpy as np
import pytest

from pocket.checker import CaptionNotUnderstood, check, read_caption
from pocket.world import SIDE_PX, Scene, Thing, caption, draw, random_scene


def a_picture(background="white", *things):
    return draw(
        Scene(background, things or (Thing("red", "circle", "small", "left"),)), random.Random(0)
    )


def test_a_true_picture_always_passes():
    rng = random.Random(7)
    scenes = [random_scene(rng, pair_share=0.4) for _ in range(200)]

    verdicts = [check(draw(scene, rng), caption(scene, rng)) for scene in scenes]

    assert [verdict.summary for verdict in verdicts if not verdict.everything_right] == []


@pytest.mark.parametrize(
    ("caption_text", "wrong"),
    [
        ("a small red circle at the left on a black background", "background"),
        ("a small blue circle at the left on a white background", "colour"),
        ("a small red square at the left on a white background", "shape"),
        ("a small red star at the left on a white background", "shape"),
        ("a small red circle at the right on a white background", "place"),
        ("a small red circle in the center on white", "place"),
        ("a large red circle at the left on a white background", "size"),
    ],
)
def test_a_wrong_attribute_is_caught_by_name(caption_text, wrong):
    verdict = check(a_picture(), caption_text)

    assert not verdict.everything_right
    assert [name for name, is_right in verdict.attributes().items() if is_right is False] == [wrong]


def test_features_that_the_caption_does_not_name_are_free():
    verdict = check(a_picture(), "a red circle on white")

    assert verdict.everything_right
    assert (verdict.place, verdict.size) == (None, None)


def test_two_objects_may_not_change_sides():
    picture = a_picture(
        "black", Thing("green", "star", "small"), Thing("white", "triangle", "small")
    )

    assert check(
        picture, "a small green star left of a small white triangle on black"
    ).everything_right
    assert not check(
        picture, "a small white triangle and a small green star on black"
    ).everything_right


def test_a_missing_second_object_is_caught():
    assert not check(a_picture(), "a red circle and a blue star on white").shape


def test_an_empty_picture_shows_nothing():
    verdict = check(np.full((SIDE_PX, SIDE_PX, 3), 245, np.uint8), "a red circle on white")

    assert verdict.background
    assert not verdict.shape
    assert "nothing" in verdict.summary


@pytest.mark.parametrize(
    "text", ["a red cat on white", "a red circle", "", "red", "a red circle and a star on white"]
)
def test_a_sentence_from_another_world_is_refused(text):
    with pytest.raises(CaptionNotUnderstood):
        read_caption(text)


def test_a_picture_of_another_size_is_refused():
    with pytest.raises(ValueError, match="128x128"):
        check(np.zeros((64, 64, 3), np.uint8), "a red circle on white")


def test_reading_a_caption_gives_back_the_scene():
    rng = random.Random(8)

    for scene in (random_scene(rng) for _ in range(200)):
        assert read_caption(caption(scene, rng, is_complete=True)) == scene


def test_the_checker_never_loads_torch():
    script = "import sys, pocket.checker; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
