"""What the database makes of jobs that are accepted.

Every column, in order of their places in line.
"""

import uuid
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal

import pytest
from sqlalchemy import text

from models import accepting, api_keys, files
from models.accepting import NewJob
from models.tables import Job
from policy.params import NAMES, Resolved
from tests.builders import a_job, a_tenant, resolved


def accept(session, tenant, *new_jobs, api_key_id=None, actor="tests"):
    own = {"tenant_id": tenant.id, "api_key_id": api_key_id, "currency": "EUR", "actor": actor}
    return accepting.accept(session, new_jobs, **own)


def a_new_job(**facts) -> NewJob:
    return NewJob(**{"params": resolved(), "start_within_s": 600.0} | facts)


def a_file(session, tenant) -> uuid.UUID:
    digest = uuid.uuid4().hex * 2
    shape = {"mode": "RGB", "size_bytes": 10, "width_px": 2, "height_px": 3}
    return files.keep(
        session,
        tenant_id=tenant.id,
        object_key=digest,
        content_sha256=digest,
        actor="tests",
        **shape,
    ).id


def every_param(session, tenant) -> dict:
    """A value of its own for each, so that none can lie in the column of another."""
    return {
        "pool": "a pool",
        "tier": "a tier",
        "model": "a model",
        "model_alias": "an alias",
        "model_version": "a version",
        "prompt": "a prompt",
        "negative_prompt": "another prompt",
        "width_px": 64,
        "height_px": 72,
        "num_steps": 5,
        "guidance": 0.1 + 0.2,
        "sampler": "a sampler",
        "seed": 2**63 - 4,
        "num_images": 3,
        "output_format": "a format",
        "init_file_id": a_file(session, tenant),
        "mask_file_id": a_file(session, tenant),
        "control_file_id": a_file(session, tenant),
        "strength": 0.7,
        "clip_skip": 2,
        "adapters": [{"name": "one", "strength": 0.5}],
        "precision": "a precision",
        "determinism": "reproducible",
        "bucket_rows": 9,
    }


def test_every_parameter_lands_in_the_column_of_its_name(session):
    tenant = a_tenant(session)
    params = every_param(session, tenant)

    [row] = accept(session, tenant, a_new_job(params=Resolved(**params)))

    job = session.get_one(Job, row.id)
    assert {name: getattr(job, name) for name in params} == params
    assert params.keys() == set(NAMES)


def test_columns_also_hold_what_a_job_has_beside_its_parameters(session):
    tenant = a_tenant(session)
    key, _ = api_keys.issue(session, tenant_id=tenant.id, name="k", pepper="p" * 32)
    [first] = accept(session, tenant, a_new_job())
    facts = {
        "run_within_s": 0.3,
        "predicted_s": 1 / 3,
        "eta_raw_s": 2.5,
        "megapixel_steps": Decimal("0.123456"),
    }
    warning = {"code": "c", "field": "prompt"}
    new_job = a_new_job(
        tenant_metadata={"order": "7"},
        warnings=[warning],
        requeue_of=first.id,
        replay_of=first.id,
        **facts,
    )

    [row] = accept(session, tenant, new_job, api_key_id=key.id)

    job = session.get_one(Job, row.id)
    assert {name: getattr(job, name) for name in facts} == facts
    assert (job.tenant_metadata, job.warnings, job.requeue_of, job.replay_of) == (
        {"order": "7"},
        [warning],
        first.id,
        first.id,
    )
    assert (job.id, job.tenant_id, job.api_key_id, job.currency) == (
        new_job.id,
        tenant.id,
        key.id,
        "EUR",
    )
    assert (job.state, job.announced_at, job.start_by - job.accepted_at) == (
        "queued",
        None,
        pytest.approx(timedelta(seconds=600), abs=timedelta(seconds=1)),
    )
    assert (row.accepted_at, row.start_by, row.release_tag, row.usage_day) == (
        job.accepted_at,
        job.start_by,
        job.release_tag,
        job.usage_day,
    )


def test_a_job_that_says_nothing_of_a_column_gets_its_default(database, session):
    """Of a column that is added later, jobs that old code accepts say nothing."""
    query = """SELECT attname, pg_get_expr(adbin, adrelid) AS expression FROM pg_attrdef
               JOIN pg_attribute ON attrelid = adrelid AND attnum = adnum
               WHERE adrelid = 'jobs'::regclass"""
    job = a_job(session)
    found = (
        session.execute(text("SELECT * FROM jobs WHERE id = :id"), {"id": job.id}).one()._mapping
    )
    with database.owner.connect() as connection:
        defaults = dict(connection.execute(text(query)).all())
        constant = {name: how for name, how in defaults.items() if "clock_timestamp" not in how}
        expected = {
            name: connection.scalar(text(f"SELECT {how}")) for name, how in constant.items()
        }

    assert {name: found[name] for name in expected} == expected
    assert defaults.keys() - expected.keys() == {"accepted_at", "release_tag"}


def test_jobs_accepted_together_stand_in_the_order_in_which_they_were_given(session):
    """Whatever the order of their ids is."""
    tenant = a_tenant(session)
    ids = sorted((accepting.new_id() for _ in range(4)), reverse=True)
    new_jobs = [a_new_job(id=job_id, predicted_s=2.0) for job_id in ids]

    rows = accept(session, tenant, *new_jobs, actor="somebody")

    events = session.execute(
        text(
            "SELECT job_id, actor FROM audit_log WHERE chain = :name "
            "AND event = 'job:request:accepted' ORDER BY seq"
        ),
        {"name": tenant.name},
    ).all()
    assert [row.id for row in rows] == ids
    assert [tuple(event) for event in events] == [(job_id, "somebody") for job_id in ids]
    tags = [row.release_tag for row in rows]
    assert [later - tags[0] for later in tags] == pytest.approx([0, 2, 4, 6], abs=1e-5)


def test_an_announced_job_is_stamped_and_moves_the_clock_and_one_that_waits_does_not(session):
    tenant = a_tenant(session)
    pool = f"pool-{uuid.uuid4().hex[:8]}"
    params = replace(resolved(), pool=pool)
    clock = text("SELECT virtual_s FROM fair_clocks WHERE pool = :pool")

    accept(session, tenant, a_new_job(params=params, predicted_s=5.0))
    assert session.scalar(clock, {"pool": pool}) is None
    [announced] = accept(session, tenant, a_new_job(params=params, announced=True))

    assert session.get_one(Job, announced.id).announced_at is not None
    assert session.scalar(clock, {"pool": pool}) == announced.release_tag


def test_jobs_of_several_tiers_stand_in_a_line_for_each_and_are_booked_together(session):
    tenant = a_tenant(session)
    fast, batch = resolved(), replace(resolved(), tier="batch")
    accept(session, tenant, a_new_job(predicted_s=1.0, megapixel_steps=Decimal(1)))
    given = [(fast, "1.5"), (batch, "0.25"), (fast, "0.25")]

    rows = accept(
        session,
        tenant,
        *(
            a_new_job(params=params, predicted_s=3.0, megapixel_steps=Decimal(amount))
            for params, amount in given
        ),
    )

    flows = text(
        "SELECT tier, queued_jobs, queued_s FROM flows WHERE tenant_id = :id ORDER BY tier"
    )
    booked = text("SELECT reserved, jobs_accepted FROM usage_ledger WHERE tenant_id = :id")
    assert [tuple(row) for row in session.execute(flows, {"id": tenant.id})] == [
        ("batch", 1, 3.0),
        ("fast", 3, 7.0),
    ]
    assert session.execute(booked, {"id": tenant.id}).all() == [(Decimal(3), 4)]
    assert rows[2].release_tag - rows[0].release_tag == pytest.approx(3.0, abs=1e-5)
