"""From a request to parameters that say everything, or a refusal that names the field and what is
accepted.
"""

from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policy import catalog
from policy.catalog import MAX_SEED, RANDOM_SEED, resolve
from policy.fleet import parse_size
from policy.params import PassThrough, RequestedAdapter, pictures_of
from policy.refusals import InvalidParam
from tests.builders import a_fleet, resolved, some_params


def refusal_of(**fields) -> InvalidParam:
    with pytest.raises(InvalidParam) as refusal:
        resolved(**fields)
    return refusal.value


def test_a_bare_prompt_gets_every_parameter():
    job = resolve(a_fleet(), some_params(prompt="a red circle"), default_seed=7)

    assert (job.model, job.model_version, job.pool, job.tier) == ("pocket", "1", "local", "fast")
    assert (job.width_px, job.height_px, job.num_steps, job.guidance, job.sampler) == (
        128,
        128,
        4,
        4.0,
        "ddim",
    )
    assert (job.seed, job.num_images, job.output_format, job.negative_prompt) == (7, 1, "png", "")
    assert (job.precision, job.determinism, job.bucket_rows) == ("fp32", "best_effort", None)


def test_parameters_that_were_asked_for_are_kept():
    job = resolved(
        negative_prompt="blue",
        tier="batch",
        size="128x192",
        steps=33,
        guidance=0.0,
        sampler="euler",
        seed=0,
        n=8,
        output_format="webp",
    )

    assert (job.negative_prompt, job.tier, job.width_px, job.height_px) == (
        "blue",
        "batch",
        128,
        192,
    )
    assert (
        job.num_steps,
        job.guidance,
        job.sampler,
        job.seed,
        job.num_images,
        job.output_format,
    ) == (33, 0.0, "euler", 0, 8, "webp")


def test_a_model_may_have_defaults_of_its_own_in_a_tier():
    fast, batch = resolved(model="large", tier="fast"), resolved(model="large", tier="batch")

    assert (fast.num_steps, fast.guidance) == (8, 1.0)
    assert (batch.num_steps, batch.guidance) == (20, 7.0)


@pytest.mark.parametrize(("size", "rows"), [("128x128", 8), ("128x192", 4)])
def test_a_reproducible_tier_pins_the_bucket_of_its_size(size, rows):
    assert resolved(tier="quality", size=size).bucket_rows == rows


@pytest.mark.parametrize(
    ("fields", "field", "accepted"),
    [
        ({"model": "pockett"}, "model", ["pocket", "large"]),
        ({"model": ""}, "model", ["pocket", "large"]),
        ({"model": "pocket\x00"}, "model", ["pocket", "large"]),
        ({"tier": "free"}, "tier", ["fast", "quality", "batch"]),
        ({"tier": ""}, "tier", ["fast", "quality", "batch"]),
        ({"size": "512x512"}, "size", ["128x128", "128x192"]),
        ({"size": "-128x-128"}, "size", ["128x128", "128x192"]),
        ({"size": ""}, "size", ["128x128", "128x192"]),
        ({"steps": 0}, "steps", {"min": 1, "max": 20}),
        ({"steps": -4}, "steps", {"min": 1, "max": 20}),
        ({"steps": 21}, "steps", {"min": 1, "max": 20}),
        ({"steps": 61, "tier": "quality"}, "steps", {"min": 1, "max": 60}),
        ({"guidance": -0.1}, "guidance", {"min": 0.0, "max": 15.0}),
        ({"guidance": 15.1}, "guidance", {"min": 0.0, "max": 15.0}),
        ({"guidance": float("nan")}, "guidance", {"min": 0.0, "max": 15.0}),
        ({"guidance": float("inf")}, "guidance", {"min": 0.0, "max": 15.0}),
        ({"sampler": "plms"}, "sampler", ["ddim", "euler"]),
        ({"sampler": ""}, "sampler", ["ddim", "euler"]),
        ({"seed": -2}, "seed", {"min": RANDOM_SEED, "max": MAX_SEED - 1}),
        ({"seed": 2**63}, "seed", {"min": RANDOM_SEED, "max": MAX_SEED - 1}),
        ({"n": 0}, "n", {"min": 1, "max": 4}),
        ({"n": 5}, "n", {"min": 1, "max": 4}),
        ({"output_format": "gif"}, "output_format", ["png", "webp", "jpeg"]),
        ({"prompt": "x" * 201}, "prompt", {"max_chars": 200}),
        ({"negative_prompt": "x" * 201}, "negative_prompt", {"max_chars": 200}),
        ({"prompt": " \n\t "}, "prompt", {"min_chars": 1}),
        ({"prompt": "red\x00circle"}, "prompt", None),
        ({"negative_prompt": "\ud800"}, "negative_prompt", None),
    ],
)
def test_a_refusal_names_the_field_and_what_is_accepted(fields, field, accepted):
    refusal = refusal_of(**fields)

    assert (refusal.field, refusal.accepted) == (field, accepted)


def test_a_tier_accepts_no_size_above_its_megapixels():
    fleet = a_fleet(
        {
            "tiers.fast.max_megapixels": 0.02,
            "models.large.sizes": ["128x128"],
            "models.large.tiers.quality.bucket_rows.128x128": 4,
        }
    )

    with pytest.raises(InvalidParam) as refusal:
        resolve(fleet, some_params(size="128x192"), default_seed=7)

    assert (refusal.value.field, refusal.value.accepted) == ("size", ["128x128"])
    assert (
        resolve(fleet, some_params(size="128x192", tier="batch"), default_seed=7).height_px == 192
    )


def test_a_seed_of_minus_one_is_one_that_is_drawn():
    assert resolved(seed=RANDOM_SEED) == resolved(seed=None)


def test_the_seed_of_the_last_image_is_still_exact_in_json():
    job = resolved(seed=MAX_SEED - 4, n=4)

    assert job.seed + job.num_images - 1 < MAX_SEED
    assert refusal_of(seed=MAX_SEED - 3, n=4).field == "seed"


def test_a_version_computes_in_a_precision_of_its_own_or_in_the_models():
    versions = [
        {"id": "1", "source": "a"},
        {"id": "half", "source": "a", "precision": "bf16", "traffic_weight": 0.0},
    ]
    model = a_fleet({"models.pocket.versions": versions}).models["pocket"]

    assert {name: own.precision for name, own in model.as_served.items()} == {
        "1": "fp32",
        "half": "bf16",
    }
    assert model.of_version("gone") == model


TIER_ADAPTER = {
    "models.pocket.adapters": {
        name: {"source": f"{name}.safetensors", "sha256": "0" * 64} for name in ("lightning", "ink")
    },
    "models.pocket.tiers.fast": {
        "version": "distilled",
        "default_sampler": "euler",
        "default_guidance": 1.0,
        "default_steps": 2,
        "adapters": [{"name": "lightning", "strength": 0.5}],
    },
    "models.pocket.versions": [
        {"id": "1", "source": "a"},
        {"id": "distilled", "source": "b", "traffic_weight": 0.0},
    ],
}


def test_a_tier_may_choose_version_sampler_steps_guidance_and_adapters():
    fleet = a_fleet(TIER_ADAPTER)

    fast, batch = (resolved(fleet, tier=tier) for tier in ("fast", "batch"))

    assert (fast.model_version, fast.sampler, fast.num_steps, fast.guidance, fast.adapters) == (
        "distilled",
        "euler",
        2,
        1.0,
        [{"name": "lightning", "strength": 0.5}],
    )
    assert (batch.model_version, batch.sampler, batch.adapters) == ("1", "ddim", None)


def test_adapters_of_a_request_come_to_those_of_the_tier_with_the_strength_it_asks_for():
    fleet = a_fleet(TIER_ADAPTER)
    asked = [RequestedAdapter("ink", 1.0), RequestedAdapter("lightning", 0.8)]

    assert resolved(fleet, adapters=asked).adapters == [
        {"name": "lightning", "strength": 0.8},
        {"name": "ink", "strength": 1.0},
    ]


@given(
    prompt=st.text(max_size=250),
    tier=st.none() | st.sampled_from(["fast", "quality", "batch", "free"]),
    model=st.none() | st.sampled_from(["pocket", "large", ""]),
    size=st.none() | st.sampled_from(["128x128", "128x192", "1024x1024", "0x0"]),
    steps=st.none() | st.integers(-5, 80),
    guidance=st.none() | st.floats(-5, 25),
    seed=st.none() | st.integers(-5, 2**64),
    n=st.integers(-2, 10),
)
def test_a_request_is_resolved_within_all_limits_or_refused_by_field(**fields):
    fleet, requested = a_fleet(), some_params(**fields)

    try:
        job = resolve(fleet, requested, default_seed=7)
    except InvalidParam as refusal:
        assert refusal.field in fields  # noqa: PT017 - either end is right
        return

    tier, model = fleet.tiers[job.tier], fleet.models[job.model]
    assert f"{job.width_px}x{job.height_px}" in model.sizes
    assert parse_size(requested.size or model.sizes[0]) == (job.width_px, job.height_px)
    assert 1 <= job.num_steps <= tier.max_steps
    assert 1 <= job.num_images <= tier.max_images
    assert 0 <= job.guidance <= model.max_guidance
    assert 0 <= job.seed <= MAX_SEED
    assert (job.bucket_rows is not None) == (tier.determinism == "reproducible")


def test_an_alias_is_its_model_and_stays_on_record():
    fleet = a_fleet(
        {
            "models.large.aliases": [
                "gpt-image-1.5",
                "stabilityai/stable-diffusion-3.5-large",
                "flux:dev",
            ]
        }
    )

    for alias in fleet.models["large"].aliases:
        job = resolve(fleet, some_params(model=alias), default_seed=7)
        assert (job.model, job.model_alias, job.pool) == ("large", alias, "big")
    assert resolve(fleet, some_params(model="large"), default_seed=7).model_alias is None
    with pytest.raises(InvalidParam) as refusal:
        resolve(fleet, some_params(model="gpt-image-9"), default_seed=7)
    assert refusal.value.accepted == ["pocket", "large", *fleet.models["large"].aliases]


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "pipeline", "plain"])
def test_a_parameter_that_is_as_asked_is_kept_in_its_range(family):
    fleet = a_fleet({"models.pocket.family": family})

    assert [resolved(fleet, clip_skip=skip).clip_skip for skip in (None, 0, 12)] == [None, 0, 12]
    for skip in (-1, 13):
        with pytest.raises(InvalidParam) as refusal:
            resolved(fleet, clip_skip=skip)
        assert (refusal.value.field, refusal.value.accepted) == ("clip_skip", {"min": 0, "max": 12})


@pytest.mark.parametrize(
    ("rule", "taken", "refused", "accepted"),
    [
        (PassThrough(low=2), (2, 99), (1, -5), {"min": 2}),
        (PassThrough(high=2), (2, -99), (3, 99), {"max": 2}),
        (PassThrough(low=0.5, high=2.0), (0.5, 2.0), (0.4, 2.1), {"min": 0.5, "max": 2.0}),
        (PassThrough(low=0.5), (0.5,), (float("nan"),), {"min": 0.5}),
        (PassThrough(high=0.5), (0.5,), (float("nan"),), {"max": 0.5}),
        (PassThrough(low=0, high=0), (0,), (-1, 1), {"min": 0, "max": 0}),
    ],
)
def test_a_rule_holds_each_end_of_its_range_by_itself(rule, taken, refused, accepted):
    model = a_fleet().models["pocket"]

    for value in taken:
        catalog._check_rule("vigour", rule, value, model, "pocket")
    for value in refused:
        with pytest.raises(InvalidParam, match="vigour: must be") as refusal:
            catalog._check_rule("vigour", rule, value, model, "pocket")
        assert (refusal.value.field, refusal.value.accepted) == ("vigour", accepted)


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("flux", "clip_skip", 0),
        ("sd", "control_image", UUID(int=1)),
        ("sd3", "control_image", UUID(int=1)),
    ],
)
def test_a_parameter_that_the_family_has_not_is_refused_by_name(family, field, value):
    with pytest.raises(InvalidParam, match="cannot be used with model pocket") as refusal:
        resolved(a_fleet({"models.pocket.family": family}), **{field: value})

    assert refusal.value.field == field


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize(
    ("family", "without", "masked"),
    [("sd", 0.8, 1.0), ("pipeline", None, None), ("plain", None, None)],
)
def test_without_a_strength_a_pipeline_decides_and_others_take_their_usual_one(
    family, without, masked, with_mask
):
    fleet = a_fleet({"models.pocket.family": family})
    pictures = {"init_image": UUID(int=1)} | ({"mask": UUID(int=2)} if with_mask else {})

    assert resolved(fleet, **pictures).strength == (masked if with_mask else without)
    assert resolved(fleet, **pictures, strength=0.5).strength == 0.5


def test_pictures_become_the_files_of_their_roles():
    fleet = a_fleet({"models.pocket.family": "pipeline"})
    requested = {"init_image": UUID(int=1), "mask": UUID(int=2), "control_image": UUID(int=3)}

    job = resolved(fleet, **requested)

    assert (job.init_file_id, job.mask_file_id, job.control_file_id) == tuple(requested.values())
    assert pictures_of(job) == requested


def test_no_output_format_but_those_of_the_list_is_accepted():
    refusal = refusal_of(output_format="gif")

    assert (refusal.field, refusal.accepted) == ("output_format", ["png", "webp", "jpeg"])
