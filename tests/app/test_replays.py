"""POST /v1/jobs/{id}/replay: the same parameters again, and from a reproducible tier the same
pixels.
"""

import json
import uuid
from types import SimpleNamespace

import pytest
from PIL import Image
from sqlalchemy import text

from app.http.idempotency import REPLAYED
from app.problems import ReplayImpossible
from app.services.replay import _check_fleet
from models import jobs, workers
from models.database import transaction
from policy.params import params_of
from tests.app.conftest import bearer
from tests.app.problem import assert_problem
from tests.builders import GONE, a_fleet
from tests.pictures import png

BODY = {"prompt": "a red circle", "tier": "batch", "steps": 60, "metadata": {"a": "b"}}
_TIMES = {"created_at", "start_by", "started_at", "run_by", "finished_at", "timing"}
OWN = _TIMES | {
    "id",
    "urls",
    "state",
    "attempt",
    "queue",
    "progress",
    "images",
    "metadata",
    "replay_of",
}


def replay(client, job, **options):
    return client.post(f"/v1/jobs/{job['id']}/replay", **options)


def test_a_replay_of_a_reproducible_job_has_the_same_pixels(api):
    # no seed: the one that was drawn is replayed
    job_body = {"prompt": "a green star", "tier": "quality", "steps": 6, "n": 2}
    job = api.post("/v1/jobs", json=job_body, headers={"Prefer": "wait=60"}).json()
    assert (job["state"], job["determinism"]) == ("succeeded", "reproducible")

    again = replay(api, job, headers={"Prefer": "wait=60"})

    assert (again.status_code, again.headers["Preference-Applied"], again.json()["state"]) == (
        202,
        "wait=60",
        "succeeded",
    )
    assert again.json()["replay_of"] == job["id"] != again.json()["id"]
    assert [image["pixels_sha256"] for image in again.json()["images"]] == [
        image["pixels_sha256"] for image in job["images"]
    ]


def test_a_job_is_replayed_whatever_became_of_it(api, canceled_job):
    again = replay(api, canceled_job).json()

    assert {name: again[name] for name in again if name not in OWN} == {
        name: canceled_job[name] for name in again if name not in OWN
    }
    api.post(again["urls"]["cancel"])


def test_a_version_that_draws_no_traffic_is_replayed_all_the_same(
    gateway_with, new_key, stack_database
):
    own = bearer(new_key())
    retired = [
        {"id": "0", "source": "pocket/checkpoint", "traffic_weight": 0},
        {"id": "1", "source": "pocket/checkpoint"},
    ]
    has_it = {"name": "gpu0@elsewhere", "pool": "local", "device": "cuda:0", "slots": 1}
    with transaction(stack_database) as session:
        workers.heartbeat(session, **has_it, facts={}, held=["pocket@0"])
    client = gateway_with(a_fleet({"models.pocket.versions": retired}))
    job = client.post("/v1/jobs", json=BODY, headers=own).json
    with transaction(stack_database) as session:
        session.execute(
            text("UPDATE jobs SET model_version = '0' WHERE id = :id"), {"id": job["id"]}
        )
    replay = client.post(f"/v1/jobs/{job['id']}/replay", headers=own)

    with transaction(stack_database) as session:
        workers.leave(session, has_it["name"])
    assert replay.json["model_version"] == "0"


@pytest.mark.parametrize(
    ("changes", "gone"),
    [
        ({"models.pocket.versions": [{"id": "2", "source": "pocket/checkpoint"}]}, "model_version"),
        ({"tiers.batch": GONE}, "tier"),
        ({"models.pocket.precision": "bf16"}, "precision"),
        ({"pools.local.tenants": ["somebody else"]}, "pool"),
    ],
)
def test_a_job_whose_model_tier_or_pool_is_gone_cannot_be_replayed(
    gateway_with, new_key, changes, gone
):
    own = bearer(new_key())
    job = gateway_with().post("/v1/jobs", json=BODY, headers=own).json

    answer = gateway_with(a_fleet(changes)).post(f"/v1/jobs/{job['id']}/replay", headers=own)

    assert assert_problem(answer, 409, "replay-impossible")["gone"] == gone


def test_a_replay_is_with_the_same_adapters_or_impossible():
    fleet, job = a_fleet(), a_job_with_the_adapter("sepia")
    with_sepia = fleet.models["pocket"].model_copy(update={"adapters": {"sepia": None}})

    _check_fleet(fleet.model_copy(update={"models": {"pocket": with_sepia}}), job)

    with pytest.raises(ReplayImpossible) as refused:
        _check_fleet(fleet, job)
    assert refused.value.members["gone"] == "adapter"


def test_a_replay_goes_to_another_pool_that_serves_the_version(gateway_with, new_key):
    own = bearer(new_key())
    job = gateway_with().post("/v1/jobs", json=BODY, headers=own).json
    moved = {"models": ["pocket"], "slots": 8, "max_batch_rows": 8, "warm_floor": 1}
    client = gateway_with(a_fleet({"pools.local": GONE, "pools.other": moved}))

    answer = client.post(f"/v1/jobs/{job['id']}/replay", headers=own)

    assert (answer.status_code, answer.json["replay_of"]) == (202, job["id"])


def test_a_reproducible_job_whose_rows_no_pool_makes_any_more_cannot_be_replayed(
    gateway_with, new_key
):
    own = bearer(new_key())
    job = gateway_with().post("/v1/jobs", json=BODY | {"tier": "quality"}, headers=own).json
    fewer = {
        "pools.local.max_batch_rows": 4,
        "models.pocket.tiers.quality.bucket_rows": {"128x128": 4, "128x192": 4},
    }

    answer = gateway_with(a_fleet(fewer)).post(f"/v1/jobs/{job['id']}/replay", headers=own)

    assert job["bucket_rows"] == 8
    assert assert_problem(answer, 409, "replay-impossible")["gone"] == "bucket_rows"


@pytest.mark.parametrize(
    ("fact", "before"), [("weights", "of before"), ("options", {"max_sequence_length": 64})]
)
def test_a_job_whose_weights_or_options_were_changed_cannot_be_replayed(
    api, stack_database, fact, before
):
    body = BODY | {"steps": 1}
    job = api.post("/v1/jobs", json=body, headers={"Prefer": "wait=60"}).json()
    with transaction(stack_database) as session:
        told = f"jsonb_set(fingerprint_facts, '{{{fact}}}', '{json.dumps(before)}')"
        session.execute(
            text(f"UPDATE attempts SET fingerprint_facts = {told} WHERE job_id = :id"),
            {"id": job["id"]},
        )

    problem = assert_problem(replay(api, job), 409, "replay-impossible")

    assert problem["gone"] == fact


def a_job_with_the_adapter(name):
    adapters = [{"name": name, "strength": 1.0}]
    return SimpleNamespace(
        model="pocket", model_version="1", precision="fp32", tier="batch", adapters=adapters
    )


@pytest.mark.parametrize("deleted", ["init_image", "mask"])
def test_a_job_whose_picture_was_deleted_cannot_be_replayed(api, deleted):
    half = Image.new("RGB", (128, 128))
    half.paste("white", (0, 0, 64, 128))
    pictures = {"init_image": Image.new("RGB", (128, 128), "teal"), "mask": half}
    files = {role: kept(api, picture) for role, picture in pictures.items()}
    job = api.post("/v1/jobs", json=BODY | files).json()
    api.post(job["urls"]["cancel"])
    assert api.delete(f"/v1/files/{files[deleted]}").status_code == 204

    problem = assert_problem(replay(api, job), 409, "replay-impossible")

    assert problem["gone"] == deleted


def kept(api, picture) -> str:
    """The id of a picture of the tenant's."""
    headers = {"Content-Type": "image/png"}
    return api.post("/v1/files", content=png(picture), headers=headers).json()["id"]


def test_an_erased_job_cannot_be_replayed(api, canceled_job):
    api.delete(canceled_job["urls"]["self"])

    assert_problem(replay(api, canceled_job), 409, "replay-impossible")


def test_an_erasure_that_comes_between_is_seen_by_the_transaction(
    api, canceled_job, stack_database
):
    """What the gateway looked up before may be gone by then."""
    with transaction(stack_database) as session:
        job = session.get(jobs.Job, uuid.UUID(canceled_job["id"]))
        params = params_of(job)
    api.delete(canceled_job["urls"]["self"])

    replay_of_it = jobs.NewJob(params=params, start_within_s=60, replay_of=job.id)
    with pytest.raises(jobs.JobErased), transaction(stack_database) as session:
        jobs.accept(
            session,
            replay_of_it,
            tenant_id=job.tenant_id,
            api_key_id=None,
            currency="EUR",
            actor="tests",
        )


def test_a_replay_under_a_key_is_one_job(api, canceled_job):
    key = {"Idempotency-Key": str(uuid.uuid4())}

    first, second = (replay(api, canceled_job, headers=key) for _ in range(2))

    assert (first.json()["id"], second.headers[REPLAYED]) == (second.json()["id"], "true")
    assert_problem(api.post("/v1/jobs", json=BODY, headers=key), 422, "idempotency-key-reused")
    api.post(first.json()["urls"]["cancel"])


def test_a_key_that_came_with_another_job_s_replay_is_refused(api, canceled_job):
    """Both requests have an empty body: only the path tells them apart."""
    other = api.post("/v1/jobs", json=BODY).json()
    key = {"Idempotency-Key": str(uuid.uuid4())}
    first = replay(api, canceled_job, headers=key).json()

    answer = replay(api, other, headers=key)

    assert_problem(answer, 422, "idempotency-key-reused")
    for job in (first, other):
        api.post(job["urls"]["cancel"])


def test_a_replay_takes_no_fields(api, canceled_job):
    problem = assert_problem(
        replay(api, canceled_job, json={"steps": 4}), 422, "invalid-image-request"
    )

    assert problem["errors"][0]["pointer"] == "/steps"
    again = replay(api, canceled_job, json={})
    assert again.status_code == 202
    api.post(again.json()["urls"]["cancel"])


def test_another_tenant_s_job_cannot_be_replayed(stranger, canceled_job):
    assert_problem(replay(stranger, canceled_job), 404, "job-not-found")
