"""What the pocket world promises: true captions, known words, honest hold-out."""

import json
import random
import subprocess
import sys

import numpy as np
import pytest

from pocket.tokenizer import MAX_TOKENS, build_tokenizer
from pocket.world import COLOURS, SIDE_PX, Scene, Thing, caption, draw, is_held_out, random_scene


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_every_caption_word_is_one_token(tokenizer):
    rng = random.Random(1)
    captions = [caption(random_scene(rng), rng) for _ in range(500)]

    for text in captions:
        assert len(tokenizer.tokenize(text)) == len(text.split())


def test_every_process_builds_the_same_vocabulary(tokenizer):
    script = (
        "import json; from pocket.tokenizer import build_tokenizer; "
        "print(json.dumps(build_tokenizer().get_vocab()))"
    )

    elsewhere = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    ).stdout

    assert json.loads(elsewhere) == tokenizer.get_vocab()


def test_every_caption_fits_the_text_encoder(tokenizer):
    rng = random.Random(2)
    captions = [caption(random_scene(rng), rng, is_complete=True) for _ in range(500)]

    assert max(len(ids) for ids in tokenizer(captions).input_ids) <= MAX_TOKENS


def test_an_unknown_word_falls_back_to_its_letters(tokenizer):
    assert "<|endoftext|>" not in tokenizer.tokenize("quizzical jam")


def test_the_same_seed_draws_the_same_picture():
    def a_picture():
        rng = random.Random(3)
        return draw(random_scene(rng), rng)

    assert np.array_equal(a_picture(), a_picture())
    assert a_picture().shape == (SIDE_PX, SIDE_PX, 3)


def test_colours_within_a_scene_all_differ():
    rng = random.Random(4)

    for scene in (random_scene(rng) for _ in range(300)):
        colours = [scene.background, *(thing.colour for thing in scene.things)]
        assert len(set(colours)) == len(colours) <= len(COLOURS)


def test_about_a_tenth_of_the_scenes_is_held_out_of_training():
    rng = random.Random(5)

    shares = [is_held_out(random_scene(rng)) for _ in range(4_000)]

    assert 0.07 < np.mean(shares) < 0.13


def test_training_scenes_are_never_held_out_ones():
    rng = random.Random(6)

    assert not any(is_held_out(random_scene(rng, held_out=False)) for _ in range(500))


def test_a_half_said_scene_cannot_be_drawn():
    with pytest.raises(ValueError, match="fully specified"):
        draw(Scene("blue", (Thing("red", "circle"),)), random.Random(0))
