"""The weights in the repository are the ones that were measured, and they still do what they are
told.
"""

import hashlib
import json

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from transformers import CLIPTokenizer

from pocket.checker import check
from pocket.evaluate import CHECKPOINT, load_pipeline, render, unseen_prompts

WEIGHTS = sorted(CHECKPOINT.glob("*/*.safetensors"))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda path: path.parent.name)
def test_shipped_weights_are_half_precision(path):
    with safe_open(path, framework="pt") as weights:
        kinds = {weights.get_tensor(name).dtype for name in weights.keys()}  # noqa: SIM118 - safe_open is no mapping

    assert kinds == {torch.float16}


def test_the_checkpoint_is_small_enough_for_a_repository():
    assert [path.parent.name for path in WEIGHTS] == ["text_encoder", "unet", "vae"]
    assert sum(path.stat().st_size for path in WEIGHTS) < 12_000_000


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda path: path.parent.name)
def test_the_readme_tells_the_digest_of_every_weight_file(path):
    assert (
        hashlib.sha256(path.read_bytes()).hexdigest()
        in (CHECKPOINT.parent / "README.md").read_text()
    )


def test_the_folder_loads_as_an_ordinary_pipeline():
    pipeline = StableDiffusionPipeline.from_pretrained(
        CHECKPOINT, safety_checker=None, use_safetensors=True, local_files_only=True
    )

    assert (
        json.loads((CHECKPOINT / "model_index.json").read_text())["_class_name"]
        == "StableDiffusionPipeline"
    )
    assert pipeline.scheduler.config.prediction_type == "v_prediction"


def test_the_shipped_tokenizer_knows_every_caption_word():
    tokenizer = CLIPTokenizer.from_pretrained(CHECKPOINT / "tokenizer")

    for prompt in unseen_prompts(100):
        assert [
            token.removesuffix("</w>") for token in tokenizer.tokenize(prompt)
        ] == prompt.split()


def test_four_steps_follow_at_least_nine_of_ten_unseen_prompts():
    prompts = unseen_prompts(10)

    pictures = render(load_pipeline(), prompts, num_steps=4)

    verdicts = [check(picture, prompt) for picture, prompt in zip(pictures, prompts, strict=True)]
    assert sum(verdict.everything_right for verdict in verdicts) >= 9, [
        verdict.summary for verdict in verdicts
    ]
