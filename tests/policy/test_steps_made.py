"""How many denoise steps an image makes, and how many rows it takes."""

import uuid
from decimal import Decimal
from types import SimpleNamespace
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policy import warnings
from policy.cost import megapixel_steps
from policy.fleet import Family, FleetInvalid
from policy.refusals import InvalidParam
from policy.steps import Denoising, denoising_of, image_steps, rows_taken, steps_made
from tests.builders import a_fleet, resolved

FAMILIES = get_args(Family)
PICTURE = {"tier": "quality", "init_image": uuid.uuid4()}


def of_family(family, **changes):
    return a_fleet(
        {
            "models.pocket.family": family,
            **{f"models.pocket.{key}": value for key, value in changes.items()},
        }
    )


def rows(family, *, guidance=4.0, negative_prompt="", **changes) -> int:
    return rows_taken(
        of_family(family, **changes).models["pocket"],
        guidance=guidance,
        negative_prompt=negative_prompt,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_are_all_that_were_asked_for_without_a_picture_and_at_full_strength(family):
    assert steps_made(family, num_steps=20, strength=None) == 20
    assert steps_made(family, num_steps=20, strength=1.0) == 20


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_from_a_picture_are_rounded_down_and_by_flows_up(family):
    steps = {"sd": 5, "sdxl": 5, "sd3": 6, "flux": 6, "pipeline": 5, "plain": 5}[family]

    assert steps_made(family, num_steps=21, strength=0.25) == steps  # 5.25
    assert steps_made(family, num_steps=23, strength=0.25) == steps  # 5.75


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_that_come_out_even_are_the_same_for_every_family(family):
    assert steps_made(family, num_steps=20, strength=0.25) == 5


@given(
    family=st.sampled_from(FAMILIES), num_steps=st.integers(1, 200), strength=st.floats(0.0001, 1.0)
)
def test_steps_are_at_least_one_and_never_more_than_were_asked_for(family, num_steps, strength):
    assert 1 <= steps_made(family, num_steps=num_steps, strength=strength) <= num_steps


@pytest.mark.parametrize("family", ["sd", "flux"])
@given(num_steps=st.integers(1, 200))
def test_the_least_strength_that_is_accepted_leaves_one_step(family, num_steps):
    fleet = a_fleet({"tiers.quality.max_steps": 200})
    with pytest.raises(InvalidParam) as refused:
        resolved(fleet, **PICTURE, steps=num_steps, strength=0.0)

    least = resolved(
        fleet, **PICTURE, steps=num_steps, strength=refused.value.accepted["min"]
    ).strength

    assert int(num_steps * least) == 1
    assert steps_made(family, num_steps=num_steps, strength=least) in (
        (1,) if family == "sd" else (1, 2)
    )


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "flux"])
def test_rows_are_two_with_guidance_above_one(family):
    assert [rows(family, guidance=guidance) for guidance in (0.0, 1.0, 1.01, 4.0)] == [1, 1, 2, 2]


def test_rows_of_flux_are_one_where_guidance_is_an_input_of_the_network():
    assert rows("flux", negative_prompt="blurred") == 1


def test_rows_of_flux_are_two_only_away_from_a_negative_prompt():
    schnell = {"guidance_distilled": False}

    assert rows("flux", negative_prompt="blurred", **schnell) == 2
    assert rows("flux", negative_prompt="", **schnell) == 1
    assert rows("flux", negative_prompt="blurred", guidance=1.0, **schnell) == 1


def test_rows_of_a_pipeline_follow_the_option_that_the_catalogue_tells_every_call():
    assert rows("pipeline", guidance=1.0, options={"true_cfg_scale": 4.0}) == 2
    assert rows("pipeline", guidance=4.0, options={"true_cfg_scale": 1.0}) == 1
    assert rows("plain", guidance=1.0, options={"guidance_scale": 3.5}) == 2


def test_only_flux_says_whether_its_guidance_is_distilled():
    with pytest.raises(
        FleetInvalid, match=r"models.pocket.guidance_distilled: means nothing to family 'sd'"
    ):
        of_family("sd", guidance_distilled=False)


def test_a_job_s_images_take_what_its_model_s_family_says():
    flow = of_family("sd3")
    job = resolved(flow, **PICTURE, steps=21, strength=0.25, guidance=1.0)

    assert denoising_of(flow, job) == Denoising(steps=6, rows=1)
    assert denoising_of(a_fleet(), job) == Denoising(steps=5, rows=1)


def test_a_job_of_a_model_that_the_catalogue_no_longer_has_takes_what_sd_does():
    flow = of_family("sd3")
    job = resolved(flow, **PICTURE, steps=21, strength=0.25, guidance=4.0)
    without = flow.model_copy(update={"models": {"large": flow.models["large"]}})

    assert denoising_of(without, job) == Denoising(steps=5, rows=2)


def test_megapixel_steps_count_the_steps_that_images_really_make():
    fleet = a_fleet()
    whole, part = (
        resolved(fleet, **PICTURE, steps=20, n=2, strength=strength) for strength in (1.0, 0.25)
    )

    assert megapixel_steps(fleet, whole) == Decimal(128 * 128 * 20 * 2) / 1_000_000
    assert megapixel_steps(fleet, part) * 4 == megapixel_steps(fleet, whole)


def test_megapixel_steps_do_not_count_rows():
    fleet = a_fleet()

    assert megapixel_steps(fleet, resolved(fleet, guidance=1.0)) == megapixel_steps(
        fleet, resolved(fleet, guidance=4.0)
    )


@pytest.mark.parametrize(("noted", "steps"), [(None, 20), (5, 5)])
def test_an_accepted_job_s_steps_are_those_it_was_counted_for(noted, steps):
    assert image_steps(SimpleNamespace(num_steps=20, steps_per_image=noted)) == steps


def test_a_negative_prompt_is_said_to_have_no_effect_where_it_takes_no_row():
    def codes(fleet, **fields):
        job = resolved(fleet, negative_prompt="blurred", **fields)
        return [warning["code"] for warning in warnings.expected(fleet.models["pocket"], job)]

    assert codes(a_fleet(), guidance=4.0) == []
    assert codes(a_fleet(), guidance=1.0) == ["negative_prompt_ignored"]
    assert codes(of_family("flux"), guidance=4.0) == ["negative_prompt_ignored"]
    assert codes(of_family("flux", guidance_distilled=False), guidance=4.0) == []
    assert codes(of_family("pipeline"), guidance=1.0) == []
