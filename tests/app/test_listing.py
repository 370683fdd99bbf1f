"""GET /v1/jobs: every job once, newest first, and nobody else's."""

import pytest

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
    ],
)
def test_a_query_that_cannot_be_used_is_named(tenant, query, parameter):
    assert assert_problem(tenant.get("/v1/jobs", params=query), 422, "invalid-query")["parameter"] == parameter


def test_a_stranger_s_list_is_empty(stranger, tenant):
    assert walk(stranger) == []


def test_another_tenant_s_cursor_shows_only_one_s_own_jobs(api, canceled_job, tenant):
    cursor = tenant.get("/v1/jobs", params={"limit": 1}).json()["next_cursor"]

    theirs = set(walk(tenant))
    assert not theirs & {job["id"] for job in api.get("/v1/jobs", params={"cursor": cursor}).json()["data"]}
