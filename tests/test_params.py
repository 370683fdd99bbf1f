"""One list of a job's parameters, one of a tenant's limits, and every place that must know them.

Where a place follows from the list it cannot forget one; the others are compared with it here, and
the message says what is missing where.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from decimal import Decimal
from types import NoneType, UnionType
from typing import Any, get_args, get_type_hints

import pytest
from click.testing import CliRunner
from sqlalchemy import inspect, text
from sqlalchemy.orm import Session

from app import documents
from app.http.account import limits_view
from app.http.admin import KeyBody, TenantChange
from app.http.body import job_request
from app.openai import body as openai_body
from app.schemas import account as account_schemas
from app.schemas import jobs as job_schemas
from app.schemas import openai as openai_schemas
from app.schemas.bodies import JobBody
from app.services.inputs import UNSEEN
from app.spec.job_fields import job_fields
from cli.job_options import job_options
from cli.keys import issue as issue_key
from cli.tenants import tenants as tenants_commands
from darkroom_client import documents as client_documents
from darkroom_client import job_fields as client_fields
from darkroom_client import jobs as client_jobs
from engine.request import ImageRequest
from models import accepting, api_keys, files, jobs, tenants
from models.accepting import AcceptedRow, NewJob
from models.database import make_engine
from models.tables import ApiKey, Job, Tenant
from policy import warnings
from policy.limits import (
    DEFAULT_SCOPES,
    KINDS,
    LIMITS,
    SCOPES,
    InvalidLimits,
    Limits,
    limits_of,
)
from policy.params import (
    ASKED,
    NAMES,
    OPENAI_ANSWER,
    OPENAI_REQUEST,
    PARAMS,
    PICTURES,
    SHOWN,
    RequestedAdapter,
    RequestedParams,
    members_of,
    params_of,
)
from policy.routing import ANYBODY
from tests.builders import a_fleet, a_tenant, resolved
from tests.documents import section, text_of, words_quoted

# What is asked for beside the image: kept with the job, not a parameter of it.
BESIDE = {"metadata", "start_deadline_s"}

# Every exception, with its reason.
TOLD_TOGETHER = {"size": "the member of width_px and height_px together"}
NOT_IN_ANSWERS = {"pool": "which workers serve a model is the operator's affair"}
NOT_AN_OPTION = {"prompt": "the argument of the command"}
NOT_REQUESTED = {"prompt": "an argument of the client's methods"}
NOT_AN_EXTRA = {
    "prompt": "OpenAI's own field",
    "model": "OpenAI's own field",
    "size": "OpenAI's own field",
    "n": "OpenAI's own field",
    "output_format": "OpenAI's own field",
    "init_image": "OpenAI's own field: image",
    "mask": "OpenAI's own field",
    "control_image": "a call has one picture and its mask",
}
SET_BY_THE_WORKER = {
    "id": "of the attempt and the image",
    "group": "the job",
    "owner": "the tenant",
    "checkpoint": "the model and its version",
    "rank": "of the tier",
    "may_skip_blocks": "of the model in the tier",
}
NOT_OFFERED_YET = {
    "policy_version": "there are no safety rules",
    "options": "of the model, in fleet.toml",
    "keep_steps": "nobody asks for forks",
    "fork": "nobody asks for forks",
}


def names_of(kind: type) -> set[str]:
    return {field.name for field in fields(kind)}


def may_be_none(kind: Any) -> bool:
    return isinstance(kind, UnionType) and NoneType in get_args(kind)


@pytest.fixture(scope="module")
def database(stack):
    """The stack's Postgres, as the gateway sees it."""
    engine = make_engine(stack.env["DATABASE_URL"], pool_size=1)
    yield engine
    engine.dispose()


@pytest.fixture
def session(database):
    """A transaction that comes to nothing in the end."""
    with Session(database) as session:
        yield session
        session.rollback()


def a_full_job(session, tenant) -> NewJob:
    """A job none of whose parameters is None or as it would be by default."""
    picture = {"mode": "RGB", "size_bytes": 9, "width_px": 8, "height_px": 8, "actor": "tests"}
    file = files.keep(
        session,
        tenant_id=tenant.id,
        object_key=f"files/{tenant.id}",
        content_sha256="0" * 64,
        **picture,
    )
    full = replace(
        resolved(),
        prompt="a blue star",
        negative_prompt="a circle",
        model_alias="gpt-image-1",
        num_images=2,
        output_format="webp",
        init_file_id=file.id,
        mask_file_id=file.id,
        control_file_id=file.id,
        strength=0.5,
        clip_skip=1,
        adapters=[{"name": "stripes", "strength": 0.5}],
        determinism="reproducible",
        bucket_rows=8,
    )
    (first,) = accepting.accept(
        session,
        [NewJob(params=resolved(), start_within_s=600)],
        tenant_id=tenant.id,
        api_key_id=None,
        currency="EUR",
        actor="tests",
    )
    return NewJob(
        params=full,
        start_within_s=600,
        predicted_s=2.5,
        megapixel_steps=Decimal("0.5"),
        tenant_metadata={"order": "7"},
        warnings=[warnings.ignored(1.0)],
        replay_of=first.id,
    )


def written(session, new, tenant) -> tuple[AcceptedRow, Job]:
    """What the database makes of a job, and its row as it is read back."""
    (row,) = accepting.accept(
        session, [new], tenant_id=tenant.id, api_key_id=None, currency="EUR", actor="tests"
    )
    return row, session.get_one(Job, row.id)


@pytest.fixture
def full(session):
    """A job with every parameter, as it was asked for, its row, and the view job_history of it."""
    tenant = a_tenant(session)
    new = a_full_job(session, tenant)
    row, job = written(session, new, tenant)
    query = text("SELECT * FROM job_history WHERE job_id = :id")
    shown = session.execute(query, {"id": row.id}).mappings().one()
    document = documents.of_accepted(new, row, tenant_id=tenant.id, currency="EUR")
    return new.params, job, document, shown


# A place that must know names, to how to find out what it must know and what it knows.
Places = Mapping[str, Callable[[], tuple[set[str], set[str]]]]


def missing_anywhere(places: Places) -> list[str]:
    """Name what each place lacks; one that cannot even be looked at lacks what its error says."""
    missing = []
    for place, look in places.items():
        try:
            all_of, known = look()
            names = sorted(all_of - known)
        except Exception as error:  # noqa: BLE001 - whatever it is, the other places are told, too
            names = [f"missing: {type(error).__name__}: {error}"]
        if names:
            missing.append(f"{place}: {', '.join(names)}")
    return missing


# Every answer that tells a job's parameters, here and as clients know it.
ANSWERS = {
    "app.schemas.Job": job_schemas.Job,
    "app.schemas.Estimate": job_schemas.Estimate,
    "darkroom_client.Job": client_jobs.Job,
    "darkroom_client.Estimate": client_documents.Estimate,
}

# The bodies of /v1/images that may have a picture.
WITH_A_PICTURE = (
    openai_schemas.EditBody,
    openai_schemas.VariationBody,
    openai_schemas.EditForm,
    openai_schemas.VariationForm,
)


def options_of_the_command() -> set[str]:
    def command() -> None: ...

    return {option.name for option in job_options(command).__click_params__}


def listed_in_the_page_on_the_api() -> set[str]:
    """The fields in backquotes of its table of a job's fields."""
    rows = [
        line
        for line in section("docs/api.md", "## Fields of a job").splitlines()
        if line[:1] == "|"
    ]
    return words_quoted("".join(row.split("|")[1] for row in rows))


def listed_as_extra_body() -> set[str]:
    page = text_of("docs/openai.md")
    return words_quoted(page.partition("`extra_body` takes")[2].partition(";")[0])


def test_every_place_knows_every_parameter_of_a_job(request):
    asked, members = set(ASKED) | BESIDE, {param.member for param in SHOWN} | set(TOLD_TOGETHER)
    extras = {param.member for param in OPENAI_REQUEST}
    engine_fields = {param.engine_field for param in PARAMS if param.engine_field}

    def kept_by_accept_jobs() -> set[str]:
        params, row, _, _ = request.getfixturevalue("full")
        return {name for name in NAMES if getattr(row, name) == getattr(params, name)}

    def told_by_job_history() -> set[str]:
        _, _, _, history = request.getfixturevalue("full")
        return {name for name, value in history.items() if value is not None}

    places: Places = {
        "policy.params.Resolved: members of requests": lambda: (set(ASKED), members),
        "policy.params: extras of /v1/images": lambda: (set(ASKED) - set(NOT_AN_EXTRA), extras),
        "app.schemas.bodies.JobBody": lambda: (asked, set(JobBody.model_fields)),
        "app.openai.body": lambda: (extras | {"metadata"}, openai_body.KNOWN_FIELDS),
        "app.schemas.openai.OwnMembers": lambda: (
            {param.member for param in OPENAI_ANSWER},
            names_of(openai_schemas.OwnMembers),
        ),
        "app.schemas.openai.GenerationBody": lambda: (
            extras - {"strength"},
            set(get_type_hints(openai_schemas.GenerationBody)),
        ),
        **{
            f"app.schemas.openai.{body.__name__}": lambda body=body: (
                extras,
                set(get_type_hints(body)),
            )
            for body in WITH_A_PICTURE
        },
        **{
            place: lambda answer=answer: (members, names_of(answer))
            for place, answer in ANSWERS.items()
        },
        "app.spec.job_fields": lambda: (asked, set(job_fields(a_fleet(), ANYBODY))),
        "models.tables.Job": lambda: (set(NAMES), set(inspect(Job).column_attrs.keys())),
        "function accept_jobs": lambda: (set(NAMES), kept_by_accept_jobs()),
        "view job_history": lambda: (
            set(NAMES) - {"width_px", "height_px"} | {"size", "metadata"},
            told_by_job_history(),
        ),
        "engine.request.ImageRequest": lambda: (engine_fields, names_of(ImageRequest)),
        "policy.params: fields of ImageRequest": lambda: (
            names_of(ImageRequest) - set(SET_BY_THE_WORKER) - set(NOT_OFFERED_YET),
            engine_fields,
        ),
        "darkroom_client.JobFields": lambda: (
            asked - set(NOT_REQUESTED),
            set(client_fields.JobFields.__annotations__),
        ),
        "darkroom_client.job_fields.PICTURE_FIELDS": lambda: (
            set(PICTURES),
            set(client_fields.PICTURE_FIELDS),
        ),
        "cli.job_options": lambda: (asked - set(NOT_AN_OPTION), options_of_the_command()),
        "docs/api.md, Fields of a job": lambda: (asked, listed_in_the_page_on_the_api()),
        "docs/openai.md, extra_body": lambda: (extras | {"metadata"}, listed_as_extra_body()),
    }

    missing = missing_anywhere(places)

    assert not missing, "\n".join(missing)
    assert {param.name for param in PARAMS if param.member is None} == {
        *NOT_IN_ANSWERS,
        "width_px",
        "height_px",
    }


def test_a_place_that_cannot_be_looked_at_does_not_hide_the_others():
    places: Places = {
        "broken": lambda: (set(), {}["gone"]),
        "forgetful": lambda: ({"n", "seed", "steps"}, {"n"}),
        "whole": lambda: ({"seed"}, {"seed", "steps"}),
    }

    assert missing_anywhere(places) == [
        "broken: missing: KeyError: 'gone'",
        "forgetful: seed, steps",
    ]


def test_a_job_s_row_is_replayed_with_every_parameter(full):
    params, row, _, _ = full

    assert params_of(row) == params
    assert [name for name in NAMES if getattr(params, name) is None] == []


def test_a_job_that_was_just_accepted_looks_as_its_row_does(full, session):
    _, row, document, _ = full
    session.expunge(row)

    read = documents.of_row(jobs.find(session, row.id, tenant_id=row.tenant_id))

    different = {
        field.name: (getattr(document, field.name), getattr(read, field.name))
        for field in fields(documents.JobDocument)
        if getattr(document, field.name) != getattr(read, field.name)
    }
    assert different == {}


@pytest.mark.parametrize("param", PARAMS, ids=NAMES)
def test_a_parameter_and_its_column_agree_on_none(param):
    assert Job.__table__.c[param.name].nullable == may_be_none(param.kind)


def test_defaults_of_requested_params_are_those_of_a_body():
    body = JobBody(prompt="a red circle")

    assert {name: getattr(body, name) or None for name in ASKED} == {
        name: getattr(RequestedParams(prompt="a red circle"), name) or None for name in ASKED
    }


def test_parameters_are_shown_in_types_of_json(full):
    params, _, _, _ = full

    shown = members_of(params)

    assert json.loads(json.dumps(shown)) == shown
    assert shown["mask"] == str(params.mask_file_id)
    assert members_of(resolved())["adapters"] == ()


def test_a_body_becomes_the_params_that_it_names():
    said = dict.fromkeys(ASKED) | {
        "prompt": "a red circle",
        "negative_prompt": "blue",
        "model": "pocket",
        "tier": "fast",
        "size": "128x128",
        "steps": 4,
        "guidance": 2.5,
        "sampler": "euler",
        "seed": 7,
        "n": 2,
        "output_format": "webp",
        "strength": 0.5,
        "clip_skip": 1,
    }
    body = JobBody(
        **{name: value for name, value in said.items() if name not in ("adapters", *PICTURES)},
        **dict.fromkeys(PICTURES, "data:,"),
        adapters=[{"name": "sepia", "strength": -0.5}, {"name": "ink"}],
    )

    asked = job_request(body)

    said |= {"adapters": (RequestedAdapter("sepia", -0.5), RequestedAdapter("ink", 1.0))}
    assert vars(asked.requested) == {**said, **dict.fromkeys(PICTURES)}
    assert vars(asked.unseen()) == {**said, **dict.fromkeys(PICTURES, UNSEEN)}
    assert asked.pictures == dict.fromkeys(PICTURES, "data:,")


def test_numbers_have_units_or_are_bare():
    bare = {"guidance", "seed", "strength"}
    numbers = {
        param.name for param in PARAMS if {int, float} & set(get_args(param.kind) or (param.kind,))
    }

    assert numbers - bare == {param.name for param in PARAMS if param.unit}


# Columns of `tenants` that are no limits, and what a change of a tenant says beside them.
NO_LIMITS = {
    "id": "the tenant",
    "name": "the tenant",
    "created_at": "the tenant",
    "weight": "its share of device time, with a command of its own",
}


def test_every_place_knows_every_limit_of_a_tenant():
    def columns() -> set[str]:
        return set(inspect(Tenant).column_attrs.keys())

    def told_by_help() -> set[str]:
        shown = CliRunner().invoke(tenants_commands, ["limit", "--help"]).output
        return set(re.findall(r"(\w+)=", shown))

    places: Places = {
        "models.tables.Tenant": lambda: (set(LIMITS), columns()),
        "policy.limits.Limits, or NO_LIMITS here": lambda: (columns(), {*LIMITS, *NO_LIMITS}),
        "app.http.admin.TenantChange": lambda: (
            {*LIMITS, "weight"},
            set(TenantChange.model_fields),
        ),
        "app.http.account.limits_view": lambda: (set(LIMITS), set(vars(limits_view(Limits())))),
        "app.schemas.Limits": lambda: (set(LIMITS), names_of(account_schemas.Limits)),
        "darkroom tenants limit --help": lambda: (set(LIMITS), told_by_help()),
        "docs/api.md": lambda: (
            set(LIMITS),
            words_quoted(section("docs/api.md", "## Rate limits and quotas")),
        ),
    }

    missing = missing_anywhere(places)

    assert not missing, "\n".join(missing)


@pytest.mark.parametrize("name", LIMITS)
def test_a_limit_and_its_column_are_of_one_type(name):
    column = Tenant.__table__.c[name]
    kind = list if KINDS[name] == tuple[str, ...] else KINDS[name]

    assert column.type.python_type is kind
    assert column.nullable == (kind is not bool)


def test_a_limit_that_is_none_limits_nothing():
    nothing = Limits()

    assert {name for name in LIMITS if getattr(nothing, name) is not None} == {"url_inputs"}
    assert not nothing.url_inputs
    assert not nothing.has_stocks
    assert nothing.allows(tier="fast", model="pocket")


@pytest.mark.parametrize(
    ("limits", "tier", "model", "is_allowed"),
    [
        ({"allowed_tiers": ("fast",)}, "fast", "pocket", True),
        ({"allowed_tiers": ("fast",)}, "batch", "pocket", False),
        ({"allowed_models": ("pocket",)}, "batch", "pocket", True),
        ({"allowed_models": ("pocket",)}, "fast", "large", False),
        ({"allowed_tiers": ("fast",), "allowed_models": ("pocket",)}, "fast", "large", False),
    ],
)
def test_a_tenant_has_the_tiers_and_models_of_its_limits(limits, tier, model, is_allowed):
    assert Limits(**limits).allows(tier=tier, model=model) is is_allowed


@pytest.mark.parametrize(
    "stock", ["max_concurrent_jobs", "daily_megapixel_steps", "monthly_megapixel_steps"]
)
def test_each_stock_alone_is_counted_by_the_database(stock):
    assert Limits(**{stock: 0}).has_stocks


def test_rate_and_burst_are_set_and_taken_away_together(session):
    tenant = a_tenant(session)
    both = {"megapixel_steps_per_minute": 5.0, "burst_megapixel_steps": 9.0}

    for change in ({"megapixel_steps_per_minute": 5.0}, {"burst_megapixel_steps": 9.0}):
        with pytest.raises(InvalidLimits, match="together"):
            tenants.limit(session, tenant, changes=change, actor="tests")
    assert limits_of({name: getattr(tenant, name) for name in LIMITS}) == Limits()
    tenants.limit(session, tenant, changes=both, actor="tests")
    with pytest.raises(InvalidLimits):
        tenants.limit(session, tenant, changes={"burst_megapixel_steps": None}, actor="tests")

    assert {name: getattr(tenant, name) for name in both} == both


def test_limits_are_written_as_their_columns_hold_them(session):
    tenant = a_tenant(session)
    said = {
        "daily_megapixel_steps": 0.1,
        "allowed_tiers": ("fast",),
        "max_stored_bytes": 0,
        "url_inputs": True,
    }

    tenants.limit(session, tenant, changes=said, actor="tests")
    session.refresh(tenant)

    assert limits_of({name: getattr(tenant, name) for name in LIMITS}) == Limits(
        daily_megapixel_steps=Decimal("0.1"),
        allowed_tiers=("fast",),
        max_stored_bytes=0,
        url_inputs=True,
    )
    tenants.limit(session, tenant, changes={"url_inputs": None}, actor="tests")
    assert tenant.url_inputs is False


@pytest.mark.parametrize("name", ["weight", "name", "id"])
def test_an_unknown_limit_is_not_changed(session, name):
    with pytest.raises(ValueError, match="no limit"):
        tenants.limit(session, a_tenant(session), changes={name: 2.0}, actor="tests")


def test_a_column_that_is_no_limit_is_not_looked_up_with_a_key(session):
    """Keys are looked up with their tenants' limits: with anything else, none could be used."""
    tenant = a_tenant(session)
    row, _ = api_keys.issue(session, tenant_id=tenant.id, name="x", pepper="p" * 32, actor="tests")

    known = api_keys.look_up(session, [row.kid])[row.kid]

    assert tuple(known.limits) == LIMITS
    assert limits_of(known.limits) == Limits()


def test_scopes_are_one_list():
    said = str(
        next(
            c.sqltext for c in ApiKey.__table__.constraints if c.name == "api_keys_scopes_are_known"
        )
    )
    [options] = [option for option in issue_key.params if option.name == "scopes"]

    assert re.findall(r"'(\w+)'", said) == list(SCOPES)
    assert set(DEFAULT_SCOPES) < set(SCOPES)
    assert tuple(options.type.choices) == SCOPES
    assert KeyBody(name="x").scopes == list(DEFAULT_SCOPES)
    assert KeyBody(scopes=list(SCOPES)).scopes == list(SCOPES)
