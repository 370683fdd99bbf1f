"""Who is released next, and may a new job go at once: decided over plain values."""

import uuid
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policy.release import (
    Outstanding,
    ReleaseHint,
    ReleaseLimits,
    Selection,
    WaitingJob,
    exceeds_cap,
    is_behind,
    may_go_at_once,
    release_hint,
    release_limits,
)
from tests.builders import a_fleet

ANNA, BERT, CARL = (uuid.UUID(int=number) for number in (1, 2, 3))
LIMITS = ReleaseLimits(slots=8, limit_images=12)
TENANTS = st.sampled_from((ANNA, BERT, CARL))
ANY_LIMITS = st.builds(
    ReleaseLimits,
    slots=st.integers(1, 8),
    limit_images=st.integers(1, 12),
    least_share=st.integers(0, 4),
    max_per_tenant=st.none() | st.integers(1, 6),
)


def outstanding(running=None, announced=None) -> Outstanding:
    """Images by tenant."""
    running, announced = Counter(running or {}), Counter(announced or {})
    return Outstanding(running + announced, running, running_s=1.0, announced_jobs=len(announced))


def a_line(*owners, num_images=1, attempt=0) -> list[WaitingJob]:
    return [
        WaitingJob(uuid.uuid4(), owner, num_images, float(tag), attempt)
        for tag, owner in enumerate(owners)
    ]


def picked(selection) -> list[tuple[uuid.UUID, bool]]:
    return [(job.job_id, job.is_front) for job in selection.picked.values()]


def hint(there, *, tenant=ANNA, num_images=1, waiting=0, sharing=1, limits=LIMITS) -> ReleaseHint:
    return release_hint(
        there,
        limits,
        tenant_id=tenant,
        num_images=num_images,
        waiting_jobs=waiting,
        sharing=sharing,
    )


def goes_at_once(there, *, tenant=ANNA, num_images=1, limits=LIMITS) -> bool:
    return may_go_at_once(there, limits, tenant_id=tenant, num_images=num_images)


# --- limits


@pytest.mark.parametrize(("live_slots", "limit"), [(0, 32), (16, 32), (48, 64)])
def test_the_limit_is_the_live_slots_and_one_batch_and_without_a_worker_one_worker_s(
    live_slots, limit
):
    assert (
        release_limits(a_fleet(), pool="local", tier="fast", live_slots=live_slots).limit_images
        == limit
    )


@pytest.mark.parametrize(
    ("tier", "slots"), [("fast", 48), ("quality", 36), ("batch", 29), ("gone", 48)]
)
def test_slots_are_all_but_those_kept_for_better_tiers(tier, slots):
    assert release_limits(a_fleet(), pool="local", tier=tier, live_slots=48).slots == slots


def test_the_least_share_is_enough_for_one_person_and_no_more_than_a_worker_holds():
    small = {f"tiers.{tier}.max_images": 1 for tier in ("fast", "quality", "batch")} | {
        "pools.local.slots": 2
    }

    assert release_limits(a_fleet(), pool="local", tier="fast", live_slots=16).least_share == 4
    assert release_limits(a_fleet(small), pool="local", tier="fast", live_slots=16).least_share == 2


def test_the_cap_is_the_tier_s_own_and_a_tier_that_is_gone_has_none():
    fleet = a_fleet({"tiers.fast.max_in_hand_per_tenant": 3})

    assert release_limits(fleet, pool="local", tier="fast", live_slots=16).max_per_tenant == 3
    assert release_limits(fleet, pool="local", tier="batch", live_slots=16).max_per_tenant is None
    assert release_limits(fleet, pool="local", tier="gone", live_slots=16).max_per_tenant is None


def test_a_pool_that_is_gone_limits_to_what_one_small_worker_holds():
    assert release_limits(a_fleet(), pool="gone", tier="fast", live_slots=0).limit_images == 2


# --- the cap


@pytest.mark.parametrize(
    ("held", "num_images", "exceeds"),
    [(0, 4, False), (3, 1, False), (3, 2, True), (0, 5, False), (1, 5, True)],
)
def test_the_cap_bounds_what_a_tenant_has_and_lets_a_larger_job_go_alone(held, num_images, exceeds):
    capped = ReleaseLimits(slots=8, limit_images=12, max_per_tenant=4)

    assert exceeds_cap(capped, held=held, num_images=num_images) is exceeds
    assert not exceeds_cap(LIMITS, held=held, num_images=num_images)


# --- behind


def test_a_tenant_is_behind_with_half_its_share_at_most_while_another_runs_too_much():
    there = outstanding(running={BERT: 8})

    # of 12 images 6 are fair
    assert is_behind(there, LIMITS, tenant_id=ANNA, num_images=3, sharing=2)
    assert not is_behind(there, LIMITS, tenant_id=BERT, num_images=1, sharing=2)


def test_a_tenant_with_something_outstanding_is_behind_up_to_half_of_its_share():
    there = outstanding(running={BERT: 8}, announced={ANNA: 1})

    assert is_behind(there, LIMITS, tenant_id=ANNA, num_images=2, sharing=2)
    assert not is_behind(there, LIMITS, tenant_id=ANNA, num_images=3, sharing=2)


def test_a_tenant_with_nothing_outstanding_is_behind_however_large_its_job_is():
    assert is_behind(
        outstanding(running={BERT: 8}), LIMITS, tenant_id=ANNA, num_images=12, sharing=2
    )


def test_nobody_is_behind_one_whose_jobs_only_stand_in_line():
    assert not is_behind(
        outstanding(announced={BERT: 12}), LIMITS, tenant_id=ANNA, num_images=1, sharing=2
    )


def test_nobody_is_behind_one_who_runs_no_more_than_its_share():
    there = outstanding(running={BERT: 4, CARL: 4})

    assert not is_behind(there, LIMITS, tenant_id=ANNA, num_images=1, sharing=2)
    assert is_behind(there, LIMITS, tenant_id=ANNA, num_images=1, sharing=3)


def test_the_least_share_counts_where_many_share():
    limits = ReleaseLimits(slots=8, limit_images=12, least_share=4)

    assert is_behind(
        outstanding(running={BERT: 8}, announced={ANNA: 1}),
        limits,
        tenant_id=ANNA,
        num_images=1,
        sharing=12,
    )
    assert not is_behind(
        outstanding(running={BERT: 4}), limits, tenant_id=ANNA, num_images=1, sharing=12
    )


# --- at once


def test_a_new_job_goes_at_once_up_to_the_slots():
    assert goes_at_once(outstanding(announced={BERT: 6}), num_images=2)
    assert not goes_at_once(outstanding(announced={BERT: 6}), num_images=3)


def test_a_new_job_larger_than_the_slots_goes_where_nothing_is_outstanding():
    assert goes_at_once(outstanding(), num_images=9)
    assert not goes_at_once(outstanding(running={BERT: 1}), num_images=9)


def test_a_new_job_does_not_go_beyond_its_tenant_s_cap():
    capped = ReleaseLimits(slots=8, limit_images=12, max_per_tenant=2)

    assert goes_at_once(outstanding(running={ANNA: 1}), limits=capped)
    assert not goes_at_once(outstanding(running={ANNA: 2}), limits=capped)
    assert goes_at_once(outstanding(running={ANNA: 2}), tenant=BERT, limits=capped)


# --- hints


def test_a_job_that_nobody_waits_before_goes_at_once_where_there_is_room():
    assert hint(outstanding(announced={BERT: 7})) is ReleaseHint.IMMEDIATE
    assert hint(outstanding(announced={BERT: 8})) is ReleaseHint.TRY_RELEASE


def test_a_release_looks_while_those_who_wait_may_be_gone_by_then():
    hints = [hint(outstanding(), waiting=waiting) for waiting in (1, 12, 13)]

    assert hints == [ReleaseHint.TRY_RELEASE, ReleaseHint.TRY_RELEASE, ReleaseHint.BACKLOGGED]


def test_a_release_looks_at_the_job_of_a_tenant_that_is_behind_whoever_waits():
    there = outstanding(running={BERT: 8})

    assert hint(there, waiting=100, sharing=2) is ReleaseHint.TRY_RELEASE
    assert hint(there, tenant=BERT, waiting=100, sharing=2) is ReleaseHint.BACKLOGGED


# --- a selection


def test_a_selection_is_in_fair_order_up_to_the_limit_and_remembers_the_last_tag():
    line, selection = a_line(*[ANNA] * 14), Selection(outstanding(), LIMITS)

    selection.take_in_order(line)

    assert picked(selection) == [(job.job_id, False) for job in line[:12]]
    assert selection.newest_tag == 11.0
    assert selection.leaves_out_some_of(line)


def test_a_selection_may_leave_some_out_where_the_limit_is_reached_and_so_no_line_is_read():
    assert Selection(outstanding(running={ANNA: 12}), LIMITS).leaves_out_some_of([])
    assert not Selection(outstanding(running={ANNA: 11}), LIMITS).leaves_out_some_of([])


def test_a_selection_that_takes_the_whole_line_leaves_nothing_out_while_there_is_room():
    line, selection = a_line(ANNA, BERT), Selection(outstanding(), LIMITS)

    selection.take_in_order(line)

    assert not selection.leaves_out_some_of(line)


def test_a_selection_never_passes_the_next_in_line_for_a_smaller_job():
    large, small = a_line(ANNA, num_images=5), a_line(BERT)
    selection = Selection(outstanding(running={CARL: 8}), LIMITS)

    selection.take_in_order([*large, *small])

    assert picked(selection) == []
    assert selection.newest_tag is None


def test_a_selection_passes_tenants_at_their_cap():
    capped = ReleaseLimits(slots=8, limit_images=12, max_per_tenant=2)
    line, selection = a_line(ANNA, ANNA, ANNA, BERT), Selection(outstanding(), capped)

    selection.take_in_order(line)

    assert [job_id for job_id, _ in picked(selection)] == [
        line[0].job_id,
        line[1].job_id,
        line[3].job_id,
    ]


def test_a_job_that_a_worker_had_before_goes_to_the_front_whoever_s_it_is():
    returned, selection = a_line(BERT, attempt=1), Selection(outstanding(running={BERT: 8}), LIMITS)

    selection.take_in_order(returned)

    assert picked(selection) == [(returned[0].job_id, True)]


def test_in_order_a_tenant_that_is_behind_goes_to_the_front_once_the_slots_are_full():
    full, with_slots = outstanding(running={BERT: 8}), outstanding(running={BERT: 7})
    for there, is_front in ((full, True), (with_slots, False)):
        [job], selection = a_line(ANNA), Selection(there, LIMITS)

        selection.take_in_order([job])

        assert picked(selection) == [(job.job_id, is_front)]


def test_those_behind_go_to_the_front_up_to_twice_the_limit_and_leave_virtual_time_alone():
    crowd = [uuid.UUID(int=number) for number in range(10, 40)]
    heads, selection = a_line(*crowd), Selection(outstanding(running={BERT: 12}), LIMITS)

    selection.take_those_behind(heads)

    assert picked(selection) == [(job.job_id, True) for job in heads[:12]]
    assert selection.newest_tag is None


def test_those_behind_are_not_picked_twice_and_the_cap_holds_there_too():
    capped = ReleaseLimits(slots=8, limit_images=12, max_per_tenant=1)
    heads = a_line(ANNA, ANNA)
    selection = Selection(outstanding(running={BERT: 8}), capped)

    selection.take_in_order(heads[:1])
    selection.take_those_behind(heads)

    assert picked(selection) == [(heads[0].job_id, True)]


@given(
    limits=ANY_LIMITS,
    running=st.dictionaries(TENANTS, st.integers(1, 6)),
    announced=st.dictionaries(TENANTS, st.integers(1, 6)),
    jobs=st.lists(st.tuples(TENANTS, st.integers(1, 4), st.integers(0, 1)), max_size=12),
)
def test_whatever_waits_a_selection_keeps_its_limits(limits, running, announced, jobs):
    line = [
        WaitingJob(uuid.UUID(int=100 + tag), owner, images, float(tag), attempt)
        for tag, (owner, images, attempt) in enumerate(jobs)
    ]
    before, there = outstanding(running, announced), outstanding(running, announced)
    selection = Selection(there, limits)

    selection.take_in_order(line)
    in_order = set(selection.picked)
    after_line = there.total_images
    selection.take_those_behind(line)

    assert after_line <= max(
        limits.limit_images, before.total_images, max((job.num_images for job in line), default=0)
    )
    assert there.total_images <= max(2 * limits.limit_images, after_line)
    taken = Counter()
    for job in line:
        taken[job.tenant_id] += job.num_images if job.job_id in selection.picked else 0
    assert there.images == before.images + taken
    for job in line:
        if job.attempt and job.job_id in selection.picked:
            assert selection.picked[job.job_id].is_front
    assert all(selection.picked[job_id].is_front for job_id in selection.picked.keys() - in_order)
    if limits.max_per_tenant is not None:
        for tenant in (ANNA, BERT, CARL):
            own = [
                job.num_images
                for job in line
                if job.tenant_id == tenant and job.job_id in selection.picked
            ]
            assert not own or there.images[tenant] <= max(limits.max_per_tenant, max(own))


@given(
    limits=ANY_LIMITS,
    running=st.dictionaries(TENANTS, st.integers(1, 6)),
    announced=st.dictionaries(TENANTS, st.integers(1, 6)),
    num_images=st.integers(1, 9),
)
def test_a_job_that_may_go_at_once_is_one_that_a_release_would_pick_for_its_queue(
    limits, running, announced, num_images
):
    limits = ReleaseLimits(
        limits.slots,
        max(limits.slots, limits.limit_images),
        limits.least_share,
        limits.max_per_tenant,
    )
    [job], there = a_line(ANNA, num_images=num_images), outstanding(running, announced)
    may = goes_at_once(there, num_images=num_images, limits=limits)

    selection = Selection(there, limits)
    selection.take_in_order([job])

    assert not may or picked(selection) == [(job.job_id, False)]
