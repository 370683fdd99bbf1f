"""Objectives of tiers: which jobs count, which met them; counting again changes nothing."""

import uuid
from datetime import timedelta

import pytest
from sqlalchemy import text

from models import jobs, leases, objectives
from policy.fleet import Slo
from tests.builders import a_fleet, a_job, a_lease, a_succeeded_job, hand_off, store

TARGETS = {"first_preview": 0.95, "final": 0.95, "success": 0.999, "eta": 0.9}


@pytest.fixture
def tiers():
    """A tier of this test alone: a preview within half a second, the end within two."""
    return {f"t-{uuid.uuid4().hex[:8]}": a_fleet().tiers["fast"]}


def met(session, tiers, span="1h") -> dict[str, tuple[int, int]]:
    """By objective: how many met it, of how many."""
    objectives.count(session, tiers)
    return {
        one.objective: (one.good, one.total)
        for one in objectives.attainments(session)
        if one.tier in tiers and one.span == span
    }


def ended(session, job, *, tier: str, took_s: float, **columns) -> None:
    """Have the job be one of the tier, and have it taken so long until now."""
    told = ", ".join(f"{name} = :{name}" for name in columns)
    statement = f"""
        UPDATE jobs SET tier = :tier, accepted_at = finished_at - make_interval(secs => :took_s)
        {"," if columns else ""} {told} WHERE id = :id
    """
    session.execute(text(statement), {"id": job.id, "tier": tier, "took_s": took_s, **columns})
    session.expire_all()


def test_jobs_that_succeeded_count_by_their_end_their_promise_and_their_first_preview(
    session, tiers
):
    [tier] = tiers
    for took_s, eta_p90_s in ((1.9, 1.0), (2.1, 3.0), (1.0, None)):
        job = a_succeeded_job(session)
        ended(session, job, tier=tier, took_s=took_s, eta_p90_s=eta_p90_s)
    for after_s in (0.4, 0.6):
        job = a_succeeded_job(session)
        ended(session, job, tier=tier, took_s=1.0)
        previewed = "UPDATE jobs SET first_preview_at = accepted_at + :after WHERE id = :id"
        session.execute(text(previewed), {"id": job.id, "after": timedelta(seconds=after_s)})

    assert met(session, tiers) == {
        "final": (4, 5),
        "eta": (1, 2),
        "first_preview": (1, 2),
        "success": (5, 5),
    }


def test_jobs_that_expired_or_failed_by_our_fault_are_no_success_and_others_do_not_count(
    session, tiers
):
    [tier] = tiers
    for code in ("internal", "unsupported"):
        lease = a_lease(session)
        leases.fail(session, lease, code=code, detail="no")
        ended(session, lease.job, tier=tier, took_s=1)
    late = a_job(session, start_within_s=-1)
    jobs.expire(session, late.id)
    ended(session, late, tier=tier, took_s=1)
    canceled = a_job(session)
    jobs.cancel(session, canceled.id, tenant_id=canceled.tenant_id, actor="tests")
    ended(session, canceled, tier=tier, took_s=1)
    ended(session, a_succeeded_job(session), tier=tier, took_s=1)

    assert met(session, tiers)["success"] == (1, 3)
    assert met(session, tiers)["final"] == (1, 1)


def test_counting_again_changes_nothing_and_finds_what_has_ended_since(session, tiers):
    [tier] = tiers
    ended(session, a_succeeded_job(session), tier=tier, took_s=1)
    assert met(session, tiers)["final"] == met(session, tiers)["final"] == (1, 1)

    ended(session, a_succeeded_job(session), tier=tier, took_s=9)

    assert met(session, tiers)["final"] == (1, 2)


def test_tier_of_no_jobs_meets_all_and_one_that_is_gone_is_told_of_no_more(session, tiers):
    [tier] = tiers
    objectives.count(session, tiers)
    told = [one for one in objectives.attainments(session) if one.tier == tier]
    assert {one.objective: one.target for one in told} == TARGETS
    assert {one.ratio for one in told} == {1.0}

    objectives.count(session, {"another": a_fleet().tiers["fast"]})

    assert not [one for one in objectives.attainments(session) if one.tier == tier]


def test_counts_of_more_than_a_month_ago_are_removed(session, tiers):
    [tier] = tiers
    ended(session, a_succeeded_job(session), tier=tier, took_s=1)
    objectives.count(session, tiers)
    moved = "UPDATE slo_counts SET bucket = bucket - interval '36 days' WHERE tier = :tier"
    session.execute(text(moved + " AND objective = 'final'"), {"tier": tier})

    assert objectives.forget_old(session) >= 1

    left = session.scalars(
        text("SELECT objective FROM slo_counts WHERE tier = :tier"), {"tier": tier}
    )
    assert set(left) == {"success"}


def test_first_preview_is_noted_once_with_its_own_time(session):
    lease = a_lease(session, num_images=2)
    hand_off(session, lease, 0, previewed_s_ago=5.0)
    session.flush()
    session.refresh(lease.job)
    first = lease.job.first_preview_at
    hand_off(session, lease, 1, previewed_s_ago=1.0)
    store(session, lease.job, 0)
    session.flush()
    session.refresh(lease.job)

    now = session.scalar(text("SELECT clock_timestamp()"))
    assert timedelta(seconds=5) <= now - first < timedelta(seconds=65)
    assert lease.job.first_preview_at == first


def test_objectives_are_parts_of_all_jobs():
    assert Slo().targets() == TARGETS
    with pytest.raises(ValueError, match="less than 1"):
        Slo(final=1)
