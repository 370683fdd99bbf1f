"""`darkroom fleet` on the running stack: every process follows, and jobs on the way end well."""

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import tomlkit
from click.testing import CliRunner
from sqlalchemy import text

from cli.main import darkroom
from fleet.stack import FIRST_TENANT, Stack
from models.database import make_engine
from settings import REPO
from tests.builders import until

JOB = {"prompt": "a red circle on a blue background", "steps": 2}
FOLLOWS_WITHIN_S = 60.0  # two seconds on a machine that has nothing else to do


class Operator:
    """Edits a copy of fleet.toml and puts it in force."""

    def __init__(self, stack: Stack, folder: Path) -> None:
        self._stack = stack
        self.file = folder / "fleet.toml"
        self.tables = tomlkit.parse((REPO / "fleet.toml").read_text()).unwrap()

    def run(self, *arguments: str, status: int = 0) -> str:
        given = ["--data-dir", str(self._stack.data_dir), "fleet", *arguments]
        done = CliRunner().invoke(darkroom, given, env={"DATABASE_URL": None})
        assert done.exit_code == status, done.output
        return done.output

    def apply(self, *, status: int = 0) -> str:
        self.file.write_text(tomlkit.dumps(self.tables))
        return self.run("apply", str(self.file), "--note", "a test", status=status)

    def pids(self) -> dict[str, int | None]:
        return {each.name: each.pid for each in self._stack.status()}

    def number(self) -> int:
        """The revision in force, as the history's first line tells."""
        found = re.search(r"^ *(\d+) +\d{4}-", self.run("history", "--limit", "1"), re.MULTILINE)
        assert found is not None
        return int(found[1])


@pytest.fixture
def operator(stack, tmp_path) -> Iterator[Operator]:
    operator = Operator(stack, tmp_path)
    before = operator.number()
    yield operator
    if operator.number() != before:
        operator.run("rollback", str(before))


@pytest.fixture
def gateway(stack) -> Iterator[httpx.Client]:
    key = {"Authorization": f"Bearer {stack.env['DARKROOM_API_KEY']}"}
    with httpx.Client(
        base_url=stack.env["DARKROOM_URL"], headers=key, timeout=90, trust_env=False
    ) as client:
        yield client


@pytest.fixture
def sql_rows(stack):
    """Ask the stack's database as an auditor: rows as dicts."""
    engine = make_engine(stack.env["AUDITOR_DATABASE_URL"], pool_size=1)

    def ask(query: str, **values) -> list[dict]:
        with engine.connect() as connection:
            return [dict(row) for row in connection.execute(text(query), values).mappings()]

    yield ask
    engine.dispose()


def tiers(gateway: httpx.Client) -> set[str]:
    return {tier["id"] for tier in gateway.get("/v1/tiers").json()["data"]}


def ended(gateway: httpx.Client, job_id: str) -> dict:
    return gateway.get(f"/v1/jobs/{job_id}", headers={"Prefer": "wait=60"}).json()


def finished(gateway: httpx.Client, job_id: str) -> dict:
    job = ended(gateway, job_id)
    assert job["state"] == "succeeded", job
    return job


def test_a_tier_that_is_added_and_removed_again_serves_all_its_jobs(operator, gateway):
    pids = operator.pids()
    operator.tables["tiers"]["night"] = operator.tables["tiers"]["batch"] | {
        "rank": 9,
        "guaranteed_share": 0.1,
    }
    told = operator.apply()
    until(lambda: "night" in tiers(gateway), within_s=FOLLOWS_WITHIN_S, what="the gateway")
    first = gateway.post("/v1/jobs", json=JOB | {"tier": "night"}, headers={"Prefer": "wait=60"})
    waiting = [
        gateway.post("/v1/jobs", json=JOB | {"tier": "night", "n": 8}).json()["id"]
        for _ in range(3)
    ]
    del operator.tables["tiers"]["night"]
    operator.apply()
    until(lambda: "night" not in tiers(gateway), within_s=FOLLOWS_WITHIN_S, what="the gateway")

    assert "+ tiers.night" in told
    assert first.json()["state"] == "succeeded", "its worker takes from the new queue"
    assert {finished(gateway, job_id)["tier"] for job_id in waiting} == {"night"}
    assert gateway.post("/v1/jobs", json=JOB | {"tier": "night"}).status_code == 422
    assert operator.pids() == pids, "no process started anew"


def test_a_model_joins_the_running_worker_and_leaves_it_again(operator, gateway):
    pids = operator.pids()
    models, pools = operator.tables["models"], operator.tables["pools"]
    models["Twin-1.5"] = models["pocket"] | {"aliases": []}
    pools["local"]["models"].append("Twin-1.5")
    operator.apply()

    def answer() -> httpx.Response:
        return gateway.post(
            "/v1/jobs", json=JOB | {"model": "Twin-1.5", "seed": 7}, headers={"Prefer": "wait=60"}
        )

    until(lambda: answer().json().get("state") == "succeeded", what="the worker")
    twin = answer().json()
    pocket = gateway.post("/v1/jobs", json=JOB | {"seed": 7}, headers={"Prefer": "wait=60"}).json()
    del models["Twin-1.5"]
    pools["local"]["models"].remove("Twin-1.5")
    operator.apply()
    until(lambda: answer().status_code == 422, within_s=FOLLOWS_WITHIN_S, what="the gateway")

    assert twin["images"][0]["pixels_sha256"] == pocket["images"][0]["pixels_sha256"]
    assert operator.pids() == pids, "no process started anew"


SPARE = {"slots": 16, "max_batch_rows": 16, "scalable": True}  # nobody starts workers for it


def waiting_in_spare(operator, gateway, *models: str) -> list[dict]:
    """A job of each of these models, in a pool of the tenant's own that has no worker."""
    own = {"models": list(models), "tenants": [FIRST_TENANT]}
    operator.tables["pools"]["spare"] = SPARE | own
    operator.apply()
    until(
        lambda: set(models) <= {each["id"] for each in gateway.get("/v1/models").json()["data"]},
        within_s=FOLLOWS_WITHIN_S,
        what="the gateway",
    )
    patient = JOB | {"tier": "batch"}
    return [gateway.post("/v1/jobs", json=patient | {"model": model}).json() for model in models]


def test_queued_jobs_of_what_is_removed_are_made_elsewhere_or_told_why_they_fail(
    operator, gateway, sql_rows
):
    models = operator.tables["models"]
    pocket = models["pocket"] | {"aliases": []}
    [version] = pocket["versions"]
    models["whole"] = dict(pocket)
    models["parts"] = pocket | {
        "versions": [version | {"traffic_weight": 0.0}, version | {"id": "2"}]
    }
    accepted = waiting_in_spare(operator, gateway, "pocket", "whole", "parts")
    assert {job["state"] for job in accepted} == {"queued"}
    moved, of_model, of_version = (job["id"] for job in accepted)

    del models["whole"]
    models["parts"] = pocket
    operator.tables["pools"]["spare"]["models"].remove("whole")
    operator.apply()
    failed = [ended(gateway, job_id)["failure"] for job_id in (of_model, of_version)]
    stays = gateway.get(f"/v1/jobs/{moved}").json()["state"]
    del operator.tables["pools"]["spare"]
    del models["parts"]
    operator.apply()

    assert [(failure["code"], failure["detail"]) for failure in failed] == [
        ("model_gone", "model whole, version 1, is no longer offered"),
        ("model_gone", "model parts, version 2, is no longer offered"),
    ]
    assert stays == "queued"
    finished(gateway, moved)
    [way] = sql_rows(
        "SELECT facts FROM audit_log WHERE job_id = :id AND event = 'job:pool:changed'", id=moved
    )
    assert (way["facts"]["left"], way["facts"]["pool"]) == ("spare", "local")


def test_a_fleet_with_an_error_is_refused_as_a_whole_by_its_key(operator):
    before = operator.number()
    operator.tables["tiers"]["fast"]["max_steps"] = 25
    operator.tables["pools"]["local"]["models"].append("nothing")

    told = operator.apply(status=1)

    assert "pools.local.models: 'nothing' is not a model of this file" in told
    assert operator.number() == before


def test_a_rollback_is_a_revision_of_its_own_with_the_older_text(operator, gateway):
    before = operator.number()
    operator.tables["tiers"]["fast"]["max_steps"] = 25
    assert "tiers.fast.max_steps: 20 -> 25" in operator.apply()
    refused = "must be from 1 to 20 (tier fast)"
    job = JOB | {"tier": "fast", "steps": 23}
    until(
        lambda: gateway.post("/v1/estimate", json=job).status_code == 200,
        within_s=FOLLOWS_WITHIN_S,
        what="the gateway",
    )

    operator.run("rollback", str(before), "--note", "too long")

    until(
        lambda: refused in gateway.post("/v1/estimate", json=job).text,
        within_s=FOLLOWS_WITHIN_S,
        what="the gateway",
    )
    assert f"back to {before}: too long" in operator.run("history")


def test_a_job_names_the_revision_under_which_it_was_accepted(operator, gateway, sql_rows):
    number = operator.number()
    job_id = gateway.post("/v1/jobs", json=JOB, headers={"Prefer": "wait=60"}).json()["id"]

    query = "SELECT fleet_revision FROM job_history WHERE job_id = :id"
    assert sql_rows(query, id=job_id) == [{"fleet_revision": number}]


def test_every_process_that_follows_tells_its_revision(operator, gateway, sql_rows):
    until(
        lambda: (
            sql_rows("SELECT DISTINCT fleet_revision FROM workers_now")
            == [{"fleet_revision": operator.number()}]
        ),
        within_s=FOLLOWS_WITHIN_S,
        what="the workers' heartbeat",
    )
