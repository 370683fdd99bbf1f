"""What jobs were seen to take: means that follow, and ends that are learnt from once."""

import uuid

import pytest
from sqlalchemy import text

from models import learning
from models.database import transaction
from models.learning import ImageTimings
from tests.builders import a_lease, a_succeeded_job
from tests.models.facts import at_once


@pytest.fixture
def pool() -> str:
    """A pool that no other test knows."""
    return f"pool-{uuid.uuid4().hex[:8]}"


def key_of(pool, model="pocket", width_px=128, height_px=128):
    return (pool, model, width_px, height_px)


def seen(images, row_step_s, fixed_s=0.1, row_steps_each=8) -> ImageTimings:
    """So many images, each of whose rows took so long a step."""
    row_steps = images * row_steps_each
    return ImageTimings(
        images=images,
        row_steps=row_steps,
        denoise_s=row_steps * row_step_s,
        fixed_s=images * fixed_s,
    )


def learnt(session, key):
    session.expire_all()
    return learning.cost_of(session, key)


def an_ended_job(session, pool, *, ago_s, guessed_s=2.0, took_s=4.0):
    """A job that ended that long ago, after `took_s` from its accept."""
    job = a_succeeded_job(session, pool=pool, eta_raw_s=guessed_s)
    query = """UPDATE jobs SET finished_at = clock_timestamp() - make_interval(secs => :ago),
                      accepted_at = clock_timestamp() - make_interval(secs => :ago + :took)
               WHERE id = :id"""
    session.execute(text(query), {"id": job.id, "ago": ago_s, "took": took_s})
    session.expire_all()
    return job


def newly_ended(session, pool):
    return [ended for ended in learning.newly_ended(session) if ended.pool == pool]


def test_a_cost_that_was_never_seen_is_not_known(session, pool):
    assert learning.cost_of(session, key_of(pool)) is None
    assert learning.eta_of(session, pool=pool, tier="fast") is None


def test_the_first_cost_that_is_seen_is_believed(session, pool):
    learning.observe(session, {key_of(pool): seen(4, row_step_s=0.02, fixed_s=0.3)})

    cost = learnt(session, key_of(pool))
    assert (cost.row_step_s, cost.fixed_s, cost.observed) == (
        pytest.approx(0.02),
        pytest.approx(0.3),
        4,
    )


def test_a_mean_weighs_images_and_not_reports(session, pool):
    learning.observe(session, {key_of(pool): seen(30, row_step_s=0.01)})
    learning.observe(session, {key_of(pool): seen(10, row_step_s=0.05)})

    assert learnt(session, key_of(pool)).row_step_s == pytest.approx(0.02)


def test_a_mean_follows_a_change_however_long_its_past(session, pool):
    learning.observe(session, {key_of(pool): seen(100_000, row_step_s=1.0, fixed_s=1.0)})

    for _ in range(6):
        learning.observe(session, {key_of(pool): seen(100, row_step_s=3.0, fixed_s=2.0)})

    cost = learnt(session, key_of(pool))
    assert 2.7 < cost.row_step_s < 3
    assert 1.85 < cost.fixed_s < 2
    assert cost.observed == 100_600


def test_sizes_models_and_pools_are_learnt_apart(session, pool):
    keys = [
        key_of(pool),
        key_of(pool, model="large"),
        key_of(pool, width_px=256),
        key_of(pool, height_px=256),
        key_of(pool + "2"),
    ]

    learning.observe(
        session, {key: seen(1, row_step_s=1.0 + number) for number, key in enumerate(keys)}
    )

    assert [learnt(session, key).row_step_s for key in keys] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "nothing",
    [
        ImageTimings(),
        ImageTimings(images=3, row_steps=0.0),
        ImageTimings(images=0, row_steps=8.0, denoise_s=1.0),
    ],
)
def test_nothing_is_learnt_from_nothing(session, pool, nothing):
    learning.observe(session, {key_of(pool): nothing})

    assert learning.cost_of(session, key_of(pool)) is None


def test_two_workers_that_report_in_opposite_order_never_block_each_other(database, pool):
    """Both would be told of a deadlock otherwise, and one of them would lose its report."""
    report = {key_of(pool, width_px=8 * number): seen(1, row_step_s=1.0) for number in range(1, 60)}
    backwards = dict(reversed(report.items()))

    def observe(seen):
        for _ in range(3):
            with transaction(database.app) as session:
                learning.observe(session, seen)

    at_once(lambda: observe(report), lambda: observe(backwards))

    with transaction(database.app) as session:
        assert {learnt(session, key).observed for key in report} == {6}


def test_jobs_that_ended_are_told_oldest_first_with_how_long_they_took(session, pool):
    an_ended_job(session, pool, ago_s=10, guessed_s=3.0, took_s=6.0)
    an_ended_job(session, pool, ago_s=20, guessed_s=2.0, took_s=5.0)

    ended = newly_ended(session, pool)

    assert [(one.tier, one.guessed_s, round(one.taken_s, 1)) for one in ended] == [
        ("fast", 2.0, 5.0),
        ("fast", 3.0, 6.0),
    ]
    assert ended[0].finished_at < ended[1].finished_at


def test_nothing_is_learnt_from_one_end_twice(session, pool):
    for ago_s in (30, 20, 10):
        an_ended_job(session, pool, ago_s=ago_s)
    first, second, _ = newly_ended(session, pool)

    for ended in (first, second):
        learning.learn_eta(session, ended, ratio_p50=1.5, ratio_p90=2.5)
    session.flush()

    assert [one.finished_at > second.finished_at for one in newly_ended(session, pool)] == [True]
    row = learning.eta_of(session, pool=pool, tier="fast")
    assert (row.ratio_p50, row.ratio_p90, row.observed, row.learnt_until) == (
        1.5,
        2.5,
        2,
        second.finished_at,
    )


def test_an_end_is_learnt_from_when_its_commit_is_surely_seen_and_not_after_an_hour(session, pool):
    an_ended_job(session, pool, ago_s=0.5)
    an_ended_job(session, pool, ago_s=3700)

    assert newly_ended(session, pool) == []


def test_only_jobs_that_succeeded_and_had_a_guess_teach(session, pool):
    an_ended_job(session, pool, ago_s=10, guessed_s=None)
    an_ended_job(session, pool, ago_s=10, guessed_s=0.0)
    running = a_lease(session, pool=pool, eta_raw_s=2.0)

    assert newly_ended(session, pool) == []
    assert running.job.state == "running"
