"""What a gateway counts: each refusal by its reason, each way in, each answer by its route."""

import base64
import uuid
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from sqlalchemy import select

from models import tenants
from models.database import transaction
from models.tables import ApiKey
from models.tables import Tenant as TenantRow
from tests.app.conftest import JOB_BODY, House, Tenant, bearer
from tests.app.moments import of_this_moment
from tests.builders import a_job, a_redis
from tests.metrics import increases
from tests.pictures import a_picture, encoded

PNG = encoded(a_picture(), "PNG")
PICTURE = "data:image/png;base64," + base64.b64encode(PNG).decode()
NO_PICTURE = "data:image/png;base64," + base64.b64encode(b"nothing of the kind").decode()
COST = 0.016384 * 20 * 8  # megapixel-steps of JOB_BODY
ACCEPTED = 'jobs_accepted{tier="batch",model="pocket"}'

Act = Callable[[], Any]


class Scene:
    """A house, a tenant, and what an operator may change of it."""

    def __init__(self, house: House, database) -> None:
        self.house, self.database = house, database
        self.tenant: Tenant = house.tenant()

    def row(self, session) -> TenantRow:
        """The tenant's, without asking the gateway, which would remember its limits for a while."""
        kid = self.tenant._headers["Authorization"].split("_")[1]
        own = select(TenantRow).join(ApiKey, ApiKey.tenant_id == TenantRow.id)
        return session.scalars(own.where(ApiKey.kid == kid)).one()

    def limit(self, **limits) -> None:
        with transaction(self.database) as session:
            tenants.limit(session, self.row(session), changes=limits, actor="tests")

    def ask(self, key: str) -> None:
        self.house.http.get("/v1/jobs", headers=bearer(key))


def accepts(scene: Scene) -> Act:
    return scene.tenant.post


def accepts_a_batch(scene: Scene) -> Act:
    batch = {"jobs": [JOB_BODY, {"prompt": 5}, JOB_BODY]}
    return lambda: scene.tenant.send("/v1/jobs:batch", batch)


def answers_again(scene: Scene) -> Act:
    key = {"Idempotency-Key": uuid.uuid4().hex}
    scene.tenant.post(headers=key)
    return lambda: scene.tenant.post(headers=key)


def answers_a_batch_again(scene: Scene) -> Act:
    key = {"Idempotency-Key": uuid.uuid4().hex}
    scene.tenant.send("/v1/jobs:batch", {"jobs": [JOB_BODY]}, headers=key)
    return lambda: scene.tenant.send("/v1/jobs:batch", {"jobs": [JOB_BODY]}, headers=key)


def replays(scene: Scene) -> Act:
    job = scene.tenant.post().json
    return lambda: scene.tenant.send(job["urls"]["replay"], {})


def cancels(scene: Scene) -> Act:
    job = scene.tenant.post().json
    return lambda: scene.tenant.send(job["urls"]["cancel"], {})


def erases(scene: Scene) -> Act:
    job = scene.tenant.post().json
    return lambda: scene.tenant.delete(job["urls"]["self"])


def hears_of_no_key(scene: Scene) -> Act:
    return lambda: scene.house.http.get("/v1/jobs")


def hears_of_a_bad_key(scene: Scene) -> Act:
    return lambda: scene.ask("dr_invented")


def hears_of_a_key_without_the_scope(scene: Scene) -> Act:
    return lambda: scene.tenant.read("/v1/admin/tenants")


def limits_requests(scene: Scene) -> Act:
    scene.limit(requests_per_minute=1)
    return lambda: [scene.tenant.read("/v1/jobs") for _ in range(2)]


def spends_a_budget(scene: Scene) -> Act:
    scene.limit(megapixel_steps_per_minute=0.006, burst_megapixel_steps=1.5 * COST)
    scene.tenant.post()
    return scene.tenant.post


def limits_jobs(scene: Scene) -> Act:
    scene.limit(max_concurrent_jobs=1)
    scene.tenant.post()
    return scene.tenant.post


def exhausts_a_quota(scene: Scene) -> Act:
    scene.limit(daily_megapixel_steps=Decimal(str(1.5 * COST)))
    scene.tenant.post()
    return scene.tenant.post


def exhausts_storage(scene: Scene) -> Act:
    scene.limit(max_stored_bytes=10)
    return lambda: scene.tenant.post(init_image=PICTURE)


def keeps_a_picture(scene: Scene) -> Act:
    return lambda: scene.tenant.post(init_image=PICTURE)


def refuses_a_picture(scene: Scene) -> Act:
    return lambda: scene.tenant.post(init_image=NO_PICTURE)


def loses_its_workers(scene: Scene) -> Act:
    scene.house.without_workers()
    return lambda: of_this_moment(scene.tenant.post)


def fills_its_queue(scene: Scene) -> Act:
    with transaction(scene.database) as session:
        own = {"tenant": scene.row(session), "pool": scene.house.pool, "tier": "batch"}
        a_job(session, **own, predicted_s=1e7)
    return lambda: of_this_moment(scene.tenant.post)


def is_saturated(scene: Scene) -> Act:
    scene.house.runs(tier="fast", predicted_s=1e5)
    return lambda: of_this_moment(lambda: scene.tenant.post(tier="fast", n=1))


def streams_events(scene: Scene) -> Act:
    job = scene.tenant.post().json
    scene.tenant.send(job["urls"]["cancel"], {})
    return lambda: scene.tenant.read(job["urls"]["events"])


SEEN = {"picture_seconds": 1}
CANCELED = {'jobs_ended{tier="batch",model="pocket",state="canceled"}': 1}
COUNTED: list[tuple[Callable[[Scene], Act], dict[str, float]]] = [
    (accepts, {ACCEPTED: 1}),
    (accepts_a_batch, {ACCEPTED: 2}),
    (answers_again, {"requests_replayed": 1}),
    (answers_a_batch_again, {"requests_replayed": 1}),
    (replays, {ACCEPTED: 1}),
    (cancels, CANCELED),
    (erases, {"jobs_erased": 1, **CANCELED}),
    (streams_events, {'events_sent{kind="final"}': 1}),
    (keeps_a_picture, {ACCEPTED: 1, 'pictures_kept{way="data_url"}': 1, **SEEN}),
    (refuses_a_picture, {"pictures_refused": 1, **SEEN}),
    (hears_of_no_key, {'auth_failures{why="no_key"}': 1}),
    (hears_of_a_bad_key, {'auth_failures{why="bad_key"}': 1}),
    (hears_of_a_key_without_the_scope, {'auth_failures{why="scope"}': 1}),
    (limits_requests, {'shed{reason="rate_limited"}': 1}),
    (spends_a_budget, {'shed{reason="budget_spent"}': 1}),
    (limits_jobs, {'shed{reason="too_many_jobs"}': 1}),
    (exhausts_a_quota, {'shed{reason="quota_exceeded"}': 1}),
    (exhausts_storage, {'shed{reason="storage_quota_exceeded"}': 1, **SEEN}),
    (fills_its_queue, {'shed{reason="tenant_queue_full"}': 1}),
    (is_saturated, {'shed{reason="saturated"}': 1}),
    (loses_its_workers, {'shed{reason="unserved"}': 1}),  # the last: no house has any after that
]


def test_a_gateway_counts_each_way_in_and_each_refusal(a_house, stack_database):
    """One house for all of them: each act is of a tenant that has nothing yet."""
    house = a_house().with_workers()
    told = {}

    for prepare, _ in COUNTED:
        act = prepare(Scene(house, stack_database))
        with increases() as grown:
            act()
        own = [name for name in grown if not name.startswith("http_")]
        told[prepare.__name__] = {name: grown[name] for name in own}

    assert told == {prepare.__name__: counts for prepare, counts in COUNTED}


def test_a_full_hand_off_is_counted_among_the_refusals(a_house, tmp_path):
    with a_redis(tmp_path, maxmemory="512kb") as full:
        tenant = a_house(handoff_url=full).with_workers().tenant()

        with increases() as grown:
            tenant.post()

    assert grown['shed{reason="handoff_full"}'] == 1


def test_limits_that_are_counted_without_redis_are_told(a_house, stack_database, elsewhere):
    scene = Scene(a_house(**elsewhere("handoff")).with_workers(), stack_database)
    scene.limit(requests_per_minute=100)
    scene.limit(megapixel_steps_per_minute=6.0, burst_megapixel_steps=10 * COST)

    with increases() as grown:
        assert scene.tenant.post().status_code == 202

    told = {name: count for name, count in grown.items() if name.startswith("limits_local")}
    assert told == {'limits_local{limit="requests"}': 1, 'limits_local{limit="budget"}': 1}


def test_answers_are_counted_and_timed_by_route_and_never_by_what_a_client_wrote(a_house):
    tenant = a_house().with_workers().tenant()
    job = tenant.post().json
    http = tenant._http

    with increases() as grown:
        tenant.get(job)
        tenant.post(headers={"Prefer": "wait=1"})  # its time is the job's
        http.get("/nowhere")
        http.open("/v1/jobs", method="BREW")
        http.get("/v1/jobs")

    def answers(method, route, status):
        return f'http_requests{{method="{method}",route="{route}",status="{status}"}}'

    def timed(method, route):
        return f'http_request_seconds{{method="{method}",route="{route}"}}'

    counted = {name: count for name, count in grown.items() if name.startswith("http_")}
    assert counted == {
        answers("GET", "/v1/jobs/<uuid:job_id>", 200): 1,
        answers("POST", "/v1/jobs", 202): 1,
        answers("GET", "unknown", 404): 1,
        answers("unknown", "unknown", 501): 1,
        answers("GET", "/v1/jobs", 401): 1,
        timed("GET", "/v1/jobs/<uuid:job_id>"): 1,
        timed("GET", "unknown"): 1,
        timed("unknown", "unknown"): 1,
        timed("GET", "/v1/jobs"): 1,
    }
