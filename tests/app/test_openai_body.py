"""OpenAI's words for images, read against a fleet.

What they come to, and that nothing else than a problem comes of nonsense.
"""

import json
import uuid
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai import OpenAI

from app.openai.answers import may_still_answer, problem_of_end
from app.openai.body import EDIT, GENERATION, VARIATION, ImageCall, gathered, nearest_size, read
from app.problems import InvalidImageRequest, JobFailed, ModelNotFound, NotOffered, Problem
from models.tables import Job
from policy.catalog import resolve
from policy.failures import FailureCode
from policy.fleet import parse_fleet, parse_size
from policy.params import RequestedAdapter
from policy.routing import ANYBODY, Asker
from policy.text import is_human
from settings import REPO
from tests.builders import a_fleet

FLEET = a_fleet()
BIG = {"models": ["large"], "slots": 8, "max_batch_rows": 8}
WORDS = [
    "prompt",
    "model",
    "n",
    "size",
    "quality",
    "output_format",
    "output_compression",
    "background",
    "moderation",
    "stream",
]
WORDS += [
    "partial_images",
    "response_format",
    "style",
    "user",
    "safety_identifier",
    "input_fidelity",
    "seed",
    "steps",
    "guidance",
    "tier",
]
WORDS += [
    "adapters",
    "sampler",
    "negative_prompt",
    "strength",
    "metadata",
    "metadata[a]",
    "svg",
    "frame_count",
    "image",
    "mask",
]
SPREAD = ["adapters[][name]", "adapters[][strength]"]
SLOWLY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
ODD = st.sampled_from(
    [
        "true",
        "auto",
        "transparent",
        "1",
        "-1",
        "1e999",
        "nan",
        "9" * 31,
        "\x00",
        "\ud800",
        10**400,
        -(10**400),
        1e308,
    ]
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=20)
    | ODD,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["name", "strength", "k"]), inner, max_size=3)
    ),
    max_leaves=5,
)


CLIENT = OpenAI(api_key="none")


def as_form(fields) -> dict[str, list[str]]:
    """The fields as the client spreads them over a form."""
    spread = CLIENT._serialize_multipartform(fields)
    return {name: value if isinstance(value, list) else [value] for name, value in spread.items()}


def a_job_that(state, *, failure_code=None, ended_ago_s=None, erased=False) -> Job:
    now = datetime.now(UTC)
    finished_at = None if ended_ago_s is None else now - timedelta(seconds=ended_ago_s)
    erased_at = now if erased else None
    return Job(
        id=uuid.uuid4(),
        state=state,
        failure_code=failure_code,
        finished_at=finished_at,
        erased_at=erased_at,
    )


def understood(read_it) -> ImageCall | None:
    """None if it was refused by a problem that names a field."""
    try:
        return read_it()
    except Problem as problem:
        named = problem.openai_error()["param"]
    assert named
    return None


@pytest.mark.parametrize("kind", [GENERATION, EDIT, VARIATION])
@SLOWLY
@given(fields=st.dictionaries(st.sampled_from(WORDS), VALUES, max_size=4))
def test_any_fields_at_all_are_understood_or_refused_with_a_problem_that_names_one(kind, fields):
    asked = understood(lambda: read(kind, {"prompt": "x", **fields}, FLEET))

    assert asked is None or 1 <= asked.requested.n <= 10
    assert asked is None or 0 <= asked.partial_images <= 3
    assert asked is None or asked.user is None or is_human(asked.user)


@SLOWLY
@given(
    form=st.dictionaries(
        st.sampled_from([*WORDS, *SPREAD]),
        st.lists(st.text(max_size=9), min_size=1, max_size=3),
        max_size=4,
    )
)
def test_any_form_at_all_is_understood_or_refused_with_a_problem_that_names_a_field(form):
    understood(lambda: read(EDIT, gathered({"prompt": ["x"], **form}), FLEET))


@SLOWLY
@given(
    seed=st.integers(0, 2**31),
    steps=st.integers(1, 50),
    guidance=st.floats(0, 10),
    adapters=st.lists(st.tuples(st.sampled_from(["sepia", "comic"]), st.floats(-4, 4)), max_size=3),
    metadata=st.dictionaries(
        st.from_regex(r"[a-z]{1,8}", fullmatch=True),
        st.from_regex(r"[a-z ]{1,8}", fullmatch=True),
        max_size=3,
    ),
    background=st.booleans(),
)
def test_a_form_asks_for_the_same_as_the_json_of_it(
    seed, steps, guidance, adapters, metadata, background
):
    fields = {
        "prompt": "x",
        "n": 2,
        "seed": seed,
        "steps": steps,
        "guidance": guidance,
        "metadata": metadata,
        "background": background,
    }
    fields["adapters"] = [{"name": name, "strength": strength} for name, strength in adapters]

    assert read(EDIT, gathered(as_form(fields)), FLEET) == read(
        EDIT, json.loads(json.dumps(fields)), FLEET
    )


def test_adapters_in_a_form_may_leave_out_their_strengths_all_or_none():
    bare = gathered({"prompt": ["x"], "adapters[][name]": ["sepia", "comic"]})
    mixed = {
        "prompt": ["x"],
        "adapters[][name]": ["sepia", "comic"],
        "adapters[][strength]": ["0.5"],
    }

    assert read(EDIT, bare, FLEET).requested.adapters == (
        RequestedAdapter("sepia", 1.0),
        RequestedAdapter("comic", 1.0),
    )
    with pytest.raises(InvalidImageRequest, match="adapters"):
        gathered(mixed)


@pytest.mark.parametrize("field", ["n", "seed", "steps", "guidance", "strength", "partial_images"])
def test_a_number_too_large_for_any_float_is_refused_by_name(field):
    with pytest.raises(InvalidImageRequest) as refusal:
        read(EDIT, {"prompt": "x", field: 10**400}, FLEET)

    assert refusal.value.openai_error()["param"] == field


@pytest.mark.parametrize("field", ["user", "safety_identifier"])
@pytest.mark.parametrize("value", ["a\x00b", "u" * 513])
def test_a_user_that_could_not_be_kept_is_refused_by_name(field, value):
    with pytest.raises(InvalidImageRequest) as refusal:
        read(GENERATION, {"prompt": "x", field: value}, FLEET)

    assert refusal.value.openai_error()["param"] == field


@pytest.mark.parametrize(
    ("fields", "user"),
    [
        ({"safety_identifier": "new", "user": "old"}, "new"),
        ({"user": "old"}, "old"),
        ({"safety_identifier": "new"}, "new"),
        ({"safety_identifier": "", "user": "old"}, "old"),
        ({"user": ""}, None),
        ({}, None),
    ],
)
def test_a_user_is_named_by_the_newer_field_if_there_are_two(fields, user):
    assert read(GENERATION, {"prompt": "x", **fields}, FLEET).user == user


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"output_format": "gif"}, "output_format"),
        ({"output_format": "svg"}, "output_format"),
        ({"svg[model]": "m"}, "svg"),
        ({"frame_count": 2}, "frame_count"),
        ({"markup": "x"}, "markup"),
        ({"background": "transparent"}, "background"),
        ({"output_compression": 80}, "output_compression"),
        ({"stream": True, "n": 2}, "stream"),
        ({"stream": True, "response_format": "url"}, "response_format"),
    ],
)
def test_a_field_that_is_not_offered_here_says_so(fields, param):
    with pytest.raises(NotOffered) as refusal:
        read(GENERATION, {"prompt": "x", **fields}, FLEET)

    assert (refusal.value.status, refusal.value.openai_error()["param"]) == (400, param)


def test_an_unknown_model_is_not_found_and_the_message_says_what_there_is():
    with pytest.raises(ModelNotFound, match=FLEET.default_model()) as refusal:
        read(GENERATION, {"prompt": "x", "model": "gpt-image-1"}, FLEET)

    assert refusal.value.status == 404


def test_a_background_that_is_a_boolean_is_ours_and_a_word_is_theirs():
    keeps = {
        said: read(GENERATION, {"prompt": "x", "background": said}, FLEET).keeps_running
        for said in (True, "true", "auto", "opaque")
    }

    assert keeps == {True: True, "true": True, "auto": False, "opaque": False}


def tier_got(requested, fleet, asker=ANYBODY) -> str:
    return resolve(fleet, requested, default_seed=7, asker=asker).tier


def requested_steps(requested, fleet) -> int:
    return resolve(fleet, requested, default_seed=7).num_steps


@pytest.mark.parametrize(
    "fleet", [FLEET, parse_fleet((REPO / "fleet.toml").read_text())], ids=["of tests", "as shipped"]
)
def test_more_quality_has_more_steps(fleet):
    all_requested = [
        read(GENERATION, {"prompt": "x", "quality": quality}, fleet).requested
        for quality in ("low", "medium", "high")
    ]

    tiers = [tier_got(requested, fleet) for requested in all_requested]
    assert tiers == ["fast", "fast", "quality"]
    assert [requested_steps(requested, fleet) for requested in all_requested] == [4, 9, 20]
    for older, newer in (("standard", "medium"), ("hd", "high")):
        same = [
            read(GENERATION, {"prompt": "x", "quality": quality}, fleet).requested
            for quality in (older, newer)
        ]
        assert same[0] == same[1]


@pytest.mark.parametrize(
    "quality", ["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"]
)
def test_a_quality_has_no_more_steps_than_its_tier(quality):
    fewer = {"tiers.fast.max_steps": 6, "models.large.tiers.fast.default_steps": 6}
    fleet = a_fleet(fewer)

    requested = read(GENERATION, {"prompt": "x", "quality": quality}, fleet).requested

    assert requested_steps(requested, fleet) <= fleet.tiers[tier_got(requested, fleet)].max_steps


def test_each_quality_has_its_tier():
    tiers = {"low": "fast", "auto": "fast", "medium": "fast", "standard": "fast"}
    tiers |= dict.fromkeys(("high", "xhigh", "max", "hd"), "quality")

    for quality, tier in tiers.items():
        requested = read(GENERATION, {"prompt": "x", "quality": quality}, FLEET).requested
        assert tier_got(requested, FLEET) == tier, quality


@pytest.mark.parametrize("quality", ["auto", "low", "medium", "high"])
@pytest.mark.parametrize(
    ("changes", "asker"),
    [
        ({"pools.local.tiers": ["batch"]}, ANYBODY),
        ({}, Asker(tiers=("batch",))),
    ],
    ids=["by its pool", "by the tenant's limits"],
)
def test_a_quality_has_a_tier_in_which_the_model_is_offered(quality, changes, asker):
    fleet = a_fleet(changes | {"pools.big": {**BIG, "tiers": ["batch"]}})

    requested = read(GENERATION, {"prompt": "x", "quality": quality}, fleet, asker).requested

    assert tier_got(requested, fleet, asker) == "batch"


def test_a_version_may_be_named_by_a_key_with_the_scope_for_it():
    asker = Asker(may_name_versions=True)

    assert read(GENERATION, {"prompt": "x", "model": "pocket@1"}, FLEET, asker).requested.model
    with pytest.raises(ModelNotFound, match="a key with the scope `versions`"):
        read(GENERATION, {"prompt": "x", "model": "pocket@1"}, FLEET)


def test_steps_and_a_tier_that_are_named_win_over_quality():
    for quality in ("low", "medium", "high"):
        assert (
            read(GENERATION, {"prompt": "x", "quality": quality, "steps": 3}, FLEET).requested.steps
            == 3
        )
        assert (
            read(
                GENERATION, {"prompt": "x", "quality": quality, "tier": "batch"}, FLEET
            ).requested.steps
            is None
        )
    for tier in FLEET.tiers:
        assert (
            read(GENERATION, {"prompt": "x", "quality": "low", "tier": tier}, FLEET).requested.tier
            == tier
        )


@SLOWLY
@given(
    sizes=st.lists(
        st.sampled_from(["128x128", "128x192", "192x128", "512x512", "1024x512"]),
        min_size=1,
        unique=True,
    ),
    width=st.integers(1, 8000),
    height=st.integers(1, 8000),
)
def test_the_nearest_size_is_one_that_is_offered_and_a_picture_of_an_offered_size_keeps_it(
    sizes, width, height
):
    assert nearest_size(tuple(sizes), width, height) in sizes
    for size in sizes:
        assert nearest_size(tuple(sizes), *parse_size(size)) == size


@pytest.mark.parametrize(
    ("state", "end", "streams", "joins"),
    [
        ("running", {}, False, True),
        ("succeeded", {"ended_ago_s": 30}, False, True),
        ("succeeded", {"ended_ago_s": 3600}, False, False),
        ("succeeded", {"ended_ago_s": 30, "erased": True}, False, False),
        ("expired", {"ended_ago_s": 5}, False, False),
        ("failed", {"failure_code": "internal", "ended_ago_s": 5}, False, False),
        ("failed", {"failure_code": "run_deadline", "ended_ago_s": 5}, False, False),
        ("failed", {"failure_code": "unsupported", "ended_ago_s": 5}, False, True),
        ("canceled", {"ended_ago_s": 5}, False, True),
        ("canceled", {"ended_ago_s": 5}, True, False),
    ],
)
def test_a_further_try_joins_a_job_that_a_new_one_could_not_do_better_than(
    state, end, streams, joins
):
    assert may_still_answer(a_job_that(state, **end), streams=streams) is joins


OURS = (
    "attempts_exhausted",
    "internal",
    "out_of_memory",
    "input_gone",
    "run_deadline",
    "not_stored",
)
THEIRS = ("unsupported", "model_gone", "no_longer_offered", "not_finite")


def test_every_failure_is_somebody_s_fault():
    assert sorted([*OURS, *THEIRS]) == sorted(FailureCode)


@pytest.mark.parametrize("code", [*OURS, *THEIRS])
def test_a_failure_of_ours_is_a_server_error_and_one_of_the_request_s_is_not(
    code,
):
    problem = problem_of_end(uuid.uuid4(), "failed", code, None)

    assert isinstance(problem, JobFailed if code in OURS else InvalidImageRequest)
    assert (problem.status >= 500) is (code in OURS)
    assert problem.members["failure_code"] == code


@pytest.mark.parametrize(
    ("fields", "is_url"),
    [
        ({"model": "dall-e-2"}, True),
        ({"model": "dall-e-3"}, True),
        ({"model": "pocket", "quality": "standard"}, True),
        ({"quality": "hd"}, True),
        ({"style": "vivid"}, True),
        ({"model": "gpt-image-1"}, False),
        ({"model": "pocket", "quality": "medium"}, False),
        ({}, False),
    ],
)
def test_a_request_for_dall_e_is_answered_with_urls_unless_it_says_otherwise(fields, is_url):
    fleet = a_fleet({"models.pocket.aliases": ["dall-e-2", "dall-e-3", "gpt-image-1"]})
    requested = {"prompt": "x", **fields}

    assert read(GENERATION, requested, fleet).as_url is is_url
    assert read(GENERATION, {**requested, "response_format": "b64_json"}, fleet).as_url is False
    assert read(GENERATION, {**requested, "response_format": "url"}, fleet).as_url is True
    assert read(GENERATION, {**requested, "stream": True}, fleet).as_url is False


@pytest.mark.parametrize(
    ("kind", "said", "guidance", "strength"),
    [
        (VARIATION, {}, 1.0, 0.6),
        (VARIATION, {"prompt": "x"}, None, 0.6),
        (VARIATION, {"guidance": 3.5, "strength": "0.9"}, 3.5, 0.9),
        (EDIT, {"prompt": "x"}, None, None),
        (EDIT, {"prompt": "x", "strength": 0.25}, None, 0.25),
    ],
)
def test_guidance_and_strength_of_a_picture_are_as_asked_or_as_the_call_needs(
    kind, said, guidance, strength
):
    requested = read(kind, said, FLEET).requested

    assert (requested.guidance, requested.strength) == (guidance, strength)


@pytest.mark.parametrize("kind", [EDIT, VARIATION])
def test_how_much_a_pipeline_changes_a_picture_is_left_to_it(kind):
    fleet = a_fleet({"models.pocket.family": "pipeline"})

    assert read(kind, {"prompt": "x"}, fleet).requested.strength is None


def test_a_generation_starts_from_no_picture_and_takes_no_strength():
    with pytest.raises(InvalidImageRequest, match="strength needs a picture"):
        read(GENERATION, {"prompt": "x", "strength": 0.5}, FLEET)


@pytest.mark.parametrize("as_text", [False, True])
def test_every_extra_reaches_the_requested_parameters(as_text):
    said = {
        "seed": 7,
        "steps": 3,
        "guidance": 2.5,
        "tier": "batch",
        "sampler": "euler",
        "clip_skip": 1,
    }
    said |= {"negative_prompt": "blue", "adapters": [{"name": "sepia", "strength": -0.5}]}
    fields = {
        name: json.dumps(value) if not isinstance(value, str) else value
        for name, value in said.items()
    }

    asked = read(
        GENERATION, {"prompt": "x", "metadata": {"a": "b"}, **(fields if as_text else said)}, FLEET
    )

    adapters = (RequestedAdapter("sepia", -0.5),)
    assert {name: getattr(asked.requested, name) for name in said} == said | {"adapters": adapters}
    assert asked.metadata == {"a": "b"}


def test_null_is_as_if_it_were_not_said():
    extras = (
        "seed",
        "steps",
        "guidance",
        "sampler",
        "negative_prompt",
        "strength",
        "clip_skip",
        "adapters",
    )

    nothing, bare = (
        read(GENERATION, {"prompt": "x", **said}, FLEET) for said in (dict.fromkeys(extras), {})
    )

    assert nothing.requested == bare.requested
    assert (bare.requested.negative_prompt, bare.requested.adapters) == ("", ())


@pytest.mark.parametrize("name", ["seed", "steps", "clip_skip"])
def test_a_whole_number_is_not_a_broken_one(name):
    with pytest.raises(InvalidImageRequest, match="must be a whole number"):
        read(GENERATION, {"prompt": "x", name: "1.5"}, FLEET)
