"""GET /v1/jobs: every job once, newest first, and nobody else's."""

import contextlib
import time
import uuid
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.http.listing import read_instant
from app.http.pages import cursor_of, parse_cursor
from app.problems import InvalidQuery
from models.ids import first_id
from tests.app.problem import assert_problem


@pytest.fixture(scope="module")
def tenant(new_tenant):
    """A tenant with seven jobs, five of them canceled."""
    tenant = new_tenant()
    for _ in range(5):
        job = tenant.post("/v1/jobs", json={"prompt": "a red circle", "tier": "batch", "steps": 60}).json()
        tenant.post(job["urls"]["cancel"])
    for _ in range(2):
        tenant.post("/v1/jobs", json={"prompt": "a red circle", "steps": 1})
    return tenant


def walk(client, **query) -> list[str]:
    """Ids of all pages, by next_cursor."""
    ids, page = [], client.get("/v1/jobs", params=query).json()
    while True:
        ids += [job["id"] for job in page["data"]]
        if not page["has_more"]:
            return ids
        page = client.get("/v1/jobs", params={**query, "cursor": page["next_cursor"]}).json()


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 100])
def test_the_cursor_walks_every_job_once_newest_first(tenant, limit):
    ids = walk(tenant, limit=limit)

    assert len(ids) == 7
    assert ids == sorted(set(ids), reverse=True)


def test_a_walk_is_not_disturbed_by_jobs_that_come_meanwhile(new_tenant):
    tenant = new_tenant()
    old = [tenant.post("/v1/jobs", json={"prompt": "a red circle", "tier": "batch"}).json() for _ in range(4)]
    first = tenant.get("/v1/jobs", params={"limit": 2}).json()

    old.append(tenant.post("/v1/jobs", json={"prompt": "a red circle", "tier": "batch"}).json())
    rest = tenant.get("/v1/jobs", params={"limit": 10, "cursor": first["next_cursor"]}).json()

    assert [job["id"] for job in first["data"] + rest["data"]] == [job["id"] for job in reversed(old[:4])]
    for job in old:
        tenant.post(job["urls"]["cancel"])


def test_the_next_page_is_also_a_link(tenant):
    answer = tenant.get("/v1/jobs", params={"limit": 3, "state": "canceled"})

    assert tenant.get(answer.links["next"]["url"]).json()["data"][0]["id"] < answer.json()["data"][-1]["id"]
    assert "next" not in tenant.get("/v1/jobs").links


def test_the_shape_is_a_list(tenant):
    page = tenant.get("/v1/jobs").json()

    assert (page["object"], page["has_more"], page["next_cursor"]) == ("list", False, None)
    assert {job["object"] for job in page["data"]} == {"job"}


def test_a_list_can_be_of_one_state(tenant):
    states = [job["state"] for job in tenant.get("/v1/jobs", params={"state": "canceled"}).json()["data"]]

    assert states == ["canceled"] * 5
    assert len(walk(tenant, state="canceled", limit=2)) == 5


@pytest.mark.parametrize(
    ("query", "parameter"),
    [
        ({"limit": "0"}, "limit"),
        ({"limit": "101"}, "limit"),
        ({"limit": "-1"}, "limit"),
        ({"limit": "ten"}, "limit"),
        ({"limit": ""}, "limit"),
        ({"limit": "²"}, "limit"),
        ({"limit": "9" * 3000}, "limit"),
        ({"state": "lost"}, "state"),
        ({"state": ""}, "state"),
        ({"state": "queued\x00"}, "state"),
        ({"cursor": "nonsense"}, "cursor"),
        ({"cursor": ""}, "cursor"),
        ({"cursor": "é" * 22}, "cursor"),
        ({"cursor": "A" * 3000}, "cursor"),
        ({"created_after": "yesterday"}, "created_after"),
        ({"created_after": "2026-11-26"}, "created_after"),
        ({"created_after": "2026-11-26T10:00:00"}, "created_after"),
        ({"created_before": "2026-13-26T10:00:00Z"}, "created_before"),
        ({"created_before": "2026-11-26T10:00:60Z"}, "created_before"),
        ({"metadata.": "x"}, "metadata."),
        ({"metadata.a": "x\x00"}, "metadata.a"),
        ({"metadata": "x"}, "metadata"),
        ({"page": "2"}, "page"),
        ({"State": "queued"}, "State"),
        ([("state", "queued"), ("state", "canceled")], "state"),
    ],
)
def test_a_query_that_cannot_be_used_is_named(tenant, query, parameter):
    assert assert_problem(tenant.get("/v1/jobs", params=query), 422, "invalid-query")["parameter"] == parameter


def test_a_newcomer_s_list_is_empty(new_tenant, tenant):
    assert walk(new_tenant()) == []


def test_another_tenant_s_cursor_shows_only_one_s_own_jobs(api, canceled_job, tenant):
    cursor = tenant.get("/v1/jobs", params={"limit": 1}).json()["next_cursor"]

    theirs = set(walk(tenant))
    assert not theirs & {job["id"] for job in api.get("/v1/jobs", params={"cursor": cursor}).json()["data"]}


def test_a_list_can_be_of_a_time(new_tenant):
    tenant = new_tenant()
    ids, instants = [], []
    for _ in range(3):
        instants.append(datetime.now(UTC))
        time.sleep(0.02)
        ids.append(tenant.post("/v1/jobs", json={"prompt": "a red circle", "tier": "batch"}).json()["id"])
        time.sleep(0.02)
    zone = timezone(timedelta(hours=5, minutes=30))

    assert walk(tenant, created_after=instants[1].isoformat()) == [ids[2], ids[1]]
    assert walk(tenant, created_before=instants[1].astimezone(zone).isoformat()) == [ids[0]]
    assert walk(tenant, created_after=instants[1].isoformat(), created_before=instants[2].isoformat(), limit=1) == [ids[1]]
    assert walk(tenant, created_after=instants[0].isoformat(), limit=1) == ids[::-1]
    assert walk(tenant, created_after="2100-01-01T00:00:00Z") == walk(tenant, created_before="1969-01-01t00:00:00.5z") == []
    for job_id in ids:
        tenant.delete(f"/v1/jobs/{job_id}")


def test_a_list_up_to_an_instant_goes_on_behind_each_page(tenant):
    ids = walk(tenant)
    asked = {"created_before": "2100-01-01T00:00:00Z", "created_after": "2001-01-01T00:00:00Z"}

    first = tenant.get("/v1/jobs", params={**asked, "limit": 3}).json()
    second = tenant.get("/v1/jobs", params={**asked, "limit": 3, "cursor": first["next_cursor"]}).json()
    early = {"created_before": "2001-01-01T00:00:00Z", "cursor": first["next_cursor"]}

    assert [job["id"] for job in first["data"] + second["data"]] == ids[:6]
    assert tenant.get("/v1/jobs", params=early).json()["data"] == []


def test_a_list_can_be_of_metadata(new_tenant, stranger):
    tenant, made = new_tenant(), {}
    for number, metadata in enumerate([{"project": "a", "user": "1"}, {"project": "a", "user": "2"}, {"project": "b"}, {}]):
        made[number] = tenant.post("/v1/jobs", json={"prompt": "a red circle", "tier": "batch", "metadata": metadata}).json()
    of = {number: job["id"] for number, job in made.items()}
    tenant.post(made[0]["urls"]["cancel"])

    assert walk(tenant, **{"metadata.project": "a"}) == walk(tenant, **{"metadata.project": "a"}, limit=1) == [of[1], of[0]]
    assert walk(tenant, **{"metadata.project": "a", "metadata.user": "1"}) == [of[0]]
    assert walk(tenant, **{"metadata.project": "a", "state": "canceled"}) == [of[0]]
    assert walk(tenant, **{"metadata.project": "c"}) == walk(stranger, **{"metadata.project": "a"}) == []
    for job_id in of.values():
        tenant.delete(f"/v1/jobs/{job_id}")
    assert walk(tenant, **{"metadata.project": "a"}) == []


@given(st.uuids())
def test_a_cursor_comes_back_as_it_was(job_id):
    assert parse_cursor(cursor_of(job_id)) == job_id


@given(st.text(max_size=40))
def test_every_text_is_a_cursor_or_is_refused(text):
    with contextlib.suppress(InvalidQuery):
        assert isinstance(parse_cursor(text), uuid.UUID)


@given(st.datetimes(timezones=st.timezones()))
def test_every_instant_of_rfc_3339_is_read_and_is_a_bound(instant):
    offset = instant.utcoffset()
    instant = instant.replace(tzinfo=timezone(timedelta(minutes=round(offset.total_seconds() / 60))))

    read = read_instant("created_after", instant.isoformat())

    assert read == instant
    assert first_id(read) <= first_id(read + timedelta(milliseconds=1)) if read.year < 9999 else first_id(read)


@given(st.text(max_size=40) | st.from_regex(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)", fullmatch=True))
def test_every_text_is_an_instant_or_is_refused(text):
    with contextlib.suppress(InvalidQuery):
        assert isinstance(first_id(read_instant("created_after", text)), uuid.UUID)
