"""What workers publish of a checkpoint, as the gateway reads it and judges requests by it."""

from uuid import UUID

import pytest

from policy import capabilities, warnings
from policy.catalog import resolve
from policy.refusals import InvalidParam
from policy.routing import Asker
from tests.abilities import NEEDED, NO_PICTURES, PLAIN
from tests.builders import a_fleet, some_params

PICTURE = UUID(int=1)


def an_ability(**changes):
    return capabilities.read(PLAIN | changes)


def resolved_by(able, *, fleet=None, **fields):
    requested = some_params(**{"prompt": "a red circle"} | fields)
    fleet = fleet or a_fleet()
    return resolve(fleet, requested, default_seed=7, known={"pocket@1": able})


def refusal_by(able, **fields):
    with pytest.raises(InvalidParam) as refusal:
        resolved_by(able, **fields)
    return refusal.value.field, refusal.value.accepted


@pytest.mark.parametrize(
    ("able", "fields", "refusal"),
    [
        ({}, {"init_image": PICTURE, "mask": PICTURE}, ("mask", ["init_image"])),
        ({"pictures": NO_PICTURES}, {"init_image": PICTURE}, ("init_image", [])),
        (NEEDED, {}, ("init_image", ["init_image", "mask"])),
        (NEEDED, {"init_image": PICTURE}, ("mask", ["init_image", "mask"])),
        ({}, {"sampler": "euler", "steps": 9}, ("steps", {"min": 1, "max": 8})),
        ({}, {"sampler": "euler", "init_image": PICTURE}, ("sampler", ["ddim"])),
        ({"samplers": {"ddim": {"max_steps": 9}}}, {"sampler": "euler"}, ("sampler", ["ddim"])),
        ({}, {"clip_skip": 2}, ("clip_skip", {"min": 0, "max": 1})),
        (
            {"negative_prompt": "refused"},
            {"negative_prompt": "blue"},
            ("negative_prompt", {"max_chars": 0}),
        ),
        (
            {"takes_strength": False},
            {"init_image": PICTURE, "strength": 0.5},
            ("strength", {"min": 1.0, "max": 1.0}),
        ),
        ({"default_strength": 0.3}, {"steps": 3}, ("steps", {"min": 4})),
        ({"rows_guided": 9}, {"tier": "quality"}, ("tier", None)),
        ({"rows_guided": 17}, {}, ("guidance", None)),
    ],
)
def test_capabilities_refuse_by_field_and_tell_what_is_accepted(able, fields, refusal):
    assert refusal_by(an_ability(**able), **fields) == refusal


def test_capabilities_of_another_family_or_checkpoint_judge_nothing():
    elsewhere = {"pocket@2": an_ability(pictures=NO_PICTURES)}
    requested = some_params(prompt="a red circle", init_image=PICTURE)

    assert resolved_by(an_ability(family="flux", pictures=NO_PICTURES), init_image=PICTURE)
    assert resolve(a_fleet(), requested, default_seed=7, known=elsewhere)


def test_capabilities_do_not_outlive_the_source_of_their_version():
    before = capabilities.source_of(a_fleet().models["pocket"], "1")
    able = an_ability(source=before, pictures=NO_PICTURES)
    again = a_fleet({"models.pocket.versions.0.source": "pocket/again"})
    listed = a_fleet({"models.pocket.versions.0.sha256": {"vae/config.json": "0" * 64}})

    assert refusal_by(able, init_image=PICTURE) == ("init_image", [])
    for fleet in (again, listed):
        assert resolved_by(able, fleet=fleet, init_image=PICTURE)


def test_capabilities_of_another_format_are_not_read_and_unknown_members_are_ignored():
    assert capabilities.read(PLAIN | {"format": capabilities.FORMAT + 1}) is None
    assert capabilities.read({"format": capabilities.FORMAT}) is None
    assert capabilities.read(PLAIN | {"dreams": 7}) == an_ability()


def test_a_refused_model_names_only_those_that_the_tenant_may_use():
    requested = some_params(prompt="a red circle", model="dall-e-9")

    with pytest.raises(InvalidParam) as refusal:
        resolve(a_fleet(), requested, default_seed=7, asker=Asker(models=["large"]))

    assert refusal.value.accepted == ["large"]
    assert "pocket" not in refusal.value.detail


@pytest.mark.parametrize(
    ("able", "fields", "codes"),
    [
        ({"negative_prompt": "ignored"}, {"negative_prompt": "blue"}, ["negative_prompt_ignored"]),
        ({}, {"negative_prompt": "blue", "guidance": 1.0}, ["negative_prompt_ignored"]),
        ({}, {"negative_prompt": "blue"}, []),
        ({"negative_prompt": "used"}, {"negative_prompt": "blue", "guidance": 1.0}, []),
        ({"guidance": "ignored"}, {"guidance": 7.0}, ["guidance_ignored"]),
        ({"guidance": "ignored"}, {}, []),  # nobody asked for any
        ({"guidance": "negated"}, {"guidance": 7.0}, ["guidance_ignored"]),
        ({"guidance": "negated"}, {"guidance": 7.0, "negative_prompt": "blue"}, []),
    ],
)
def test_what_has_no_effect_by_the_capabilities_is_warned_of(able, fields, codes):
    able = an_ability(**able)
    job = resolved_by(able, **fields)

    found = warnings.expected(a_fleet().models["pocket"], job, able)

    assert [warning["code"] for warning in found] == codes
