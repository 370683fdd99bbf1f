"""What a worker asks of its engine is what the job says, parameter by parameter."""

from dataclasses import replace

import numpy as np
import pytest

from engine.request import AdapterUse, Determinism, ImageRequest, Picture
from policy.params import PARAMS
from tasks.render import rendering
from tests.builders import resolved

OWN = {"id": "a", "group": "j", "owner": "t", "checkpoint": "pocket@1"}


def request_of(job, index=0, pictures=None) -> ImageRequest:
    return ImageRequest(**OWN, **rendering(job, index, pictures or {}))


def test_a_request_says_what_its_job_says():
    job = resolved(tier="quality", negative_prompt="blue", seed=7, n=3, clip_skip=1)

    request = request_of(job, index=2)

    same = {param.engine_field for param in PARAMS if param.engine_field} - {
        "seed",
        "determinism",
        "adapters",
        "strength",
        "init_image",
        "mask",
        "control_image",
    }
    assert {name: getattr(request, name) for name in same} == {
        name: getattr(job, name) for name in same
    }
    assert request.seed == 9
    assert request.determinism is Determinism.REPRODUCIBLE


def test_parameters_that_a_job_leaves_open_are_the_engine_s_own_defaults():
    request = request_of(resolved())

    assert (request.strength, request.clip_skip, request.bucket_rows) == (None, 0, None)
    assert (request.init_image, request.mask, request.control_image) == (None, None, None)
    assert request.adapters == ()


@pytest.mark.parametrize("role", ["init_image", "mask", "control_image"])
def test_each_picture_is_given_in_its_role(role):
    picture = Picture(np.zeros((128, 128, 3), dtype=np.uint8))

    assert getattr(request_of(resolved(), pictures={role: picture}), role) is picture


def test_adapters_are_given_with_their_strengths():
    job = replace(resolved(), adapters=[{"name": "sepia", "strength": -0.5}])

    assert request_of(job).adapters == (AdapterUse("sepia", -0.5),)
