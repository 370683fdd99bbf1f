"""Which devices get no worker: those that were lost twice within a day, until they are released."""

import uuid
from dataclasses import replace

import pytest
from sqlalchemy import text

from models import quarantine, workers
from models.quarantine import Loss
from policy.workers import LOST_TWICE_WITHIN, device_key

DAY_S = LOST_TWICE_WITHIN.total_seconds()


@pytest.fixture
def device() -> str:
    return f"GPU-{uuid.uuid4()}"


def a_loss(device: str) -> Loss:
    return Loss(
        device=device,
        worker=f"sdxl-{device}@here",
        pool="sdxl",
        capacity_class="spot",
        host="here",
        pid=7,
    )


def shown(session, device):
    query = text("SELECT * FROM workers_now WHERE device = :device")
    return session.execute(query, {"device": device}).one_or_none()


def events(session, device):
    query = text(
        "SELECT event, actor FROM audit_log WHERE facts ->> 'device' = :device ORDER BY seq"
    )
    return session.execute(query, {"device": device}).all()


def test_a_device_that_was_lost_once_gets_a_worker_again(session, device):
    quarantine.note_loss(session, a_loss(device))

    assert quarantine.quarantined_of(session, [device]) == set()
    assert shown(session, device) is None


def test_a_device_that_was_lost_twice_is_shown_with_its_reason_and_since_when(session, device):
    first, second = a_loss(device), a_loss(device)
    quarantine.note_loss(session, first, ago_s=600)
    workers.heartbeat(session, name=second.worker, pool="sdxl", device="cuda:0", slots=4, facts={})
    session.execute(
        text("UPDATE workers SET host = 'here', pid = 7 WHERE name = :name"),
        {"name": second.worker},
    )

    quarantine.note_loss(session, second)

    assert quarantine.quarantined_of(session, [device, "GPU-another"]) == {device}
    assert quarantine.count_by_pool(session)["sdxl"] >= 1
    row = shown(session, device)
    assert (row.worker, row.pool, row.capacity_class) == (second.worker, "sdxl", "spot")
    assert (row.state, row.slots, row.host) == ("quarantined", 0, "here")
    assert f"darkroom workers release {device}" in row.problem
    assert row.started_at is not None
    named = text("SELECT count(*) FROM workers_now WHERE worker = :name")
    assert session.scalar(named, {"name": second.worker}) == 1, "its worker's own row is gone"


def test_a_loss_that_is_told_twice_counts_once(session, device):
    loss = a_loss(device)

    quarantine.note_loss(session, loss, ago_s=3)
    quarantine.note_loss(session, loss)

    assert quarantine.quarantined_of(session, [device]) == set()


def test_losses_that_lie_far_apart_do_not_count_together(session, device):
    quarantine.note_loss(session, a_loss(device), ago_s=DAY_S + 60)
    quarantine.note_loss(session, a_loss(device))
    assert quarantine.quarantined_of(session, [device]) == set()

    quarantine.note_loss(session, a_loss(device))

    assert quarantine.quarantined_of(session, [device]) == {device}


@pytest.mark.parametrize("named", ["device", "worker"])
def test_an_operator_releases_a_device_and_its_losses_until_then_count_no_more(
    session, device, named
):
    loss = a_loss(device)
    quarantine.note_loss(session, loss)
    assert not quarantine.release(session, device, actor="me@here"), "it is not quarantined"
    quarantine.note_loss(session, replace(loss, id=uuid.uuid4()))

    released = quarantine.release(session, getattr(loss, named), actor="me@here")

    assert [each.device for each in released] == [device]
    assert shown(session, device) is None
    assert events(session, device) == [
        ("device:quarantine:started", loss.worker),
        ("device:quarantine:ended", "me@here"),
    ]
    quarantine.note_loss(session, a_loss(device))
    assert quarantine.quarantined_of(session, [device]) == set()


def test_devices_are_told_apart_from_those_of_other_hosts():
    assert device_key("GPU-8f6e2a1c", "a") == "GPU-8f6e2a1c"
    assert device_key("0", "a") == "0@a"
