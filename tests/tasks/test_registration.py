"""Whose a name is: a worker's belongs to one live process, from before it loads its models."""

import os
import subprocess
import sys
import uuid

import pytest
from sqlalchemy import text

from edges import processes
from models import workers
from models.database import transaction
from models.workers import NewWorker
from settings import EX_CONFIG, REPO
from tasks.keeper import LeaseKeeper
from tasks.registration import NameTaken, WorkerIdentity
from tests.builders import a_lease, until


@pytest.fixture
def name() -> str:
    return f"cpu0@{uuid.uuid4().hex[:8]}"


@pytest.fixture
def other():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    yield process
    process.kill()
    process.wait()


def a_keeper(here, name, **times) -> LeaseKeeper:
    identity = WorkerIdentity(name=name, pool="local", device="cpu", slots=16, facts={})
    return LeaseKeeper(
        here.database,
        identity,
        ended=here.renderer.verdicts.ended,
        **{"ttl_s": 6, "renew_s": 0.2, "stop_s": 5} | times,
    )


def holds(here, name, process: str, *, pid=0, silent_after_s=600.0) -> uuid.UUID:
    """Have the name held by another process, which does not beat."""
    new = NewWorker(
        name=name,
        pool="edit",
        device="cpu",
        instance=uuid.uuid4(),
        host="there",
        pid=pid,
        process=process,
    )
    with transaction(here.database) as session:
        workers.claim(session, new, silent_after_s=silent_after_s)
    return new.instance


def row(here, name):
    with transaction(here.database) as session:
        query = text("SELECT * FROM workers WHERE name = :name")
        return session.execute(query, {"name": name}).one_or_none()


def test_worker_whose_name_a_live_process_of_this_machine_has_is_refused_at_once(here, name, other):
    instance = holds(here, name, processes.process_key(other.pid), pid=other.pid)

    with pytest.raises(NameTaken) as refused:
        a_keeper(here, name).start(max_attempts=5)

    assert f"the name {name!r} is taken by a live worker of pool 'edit'" in str(refused.value)
    assert f"host there, process {other.pid}" in str(refused.value)
    assert "WORKER_NAME" in str(refused.value)
    assert row(here, name).instance == instance


def test_worker_takes_the_name_of_a_process_that_was_killed_a_moment_ago(here, name, other):
    holds(here, name, processes.process_key(other.pid))
    job = here.accept()
    with transaction(here.database) as session:
        a_lease(session, job, worker=name)
    other.kill()
    other.wait()

    keeper = a_keeper(here, name)
    keeper.start(max_attempts=5)

    assert row(here, name).instance == keeper.identity.instance
    assert here.row(job).state == "queued", "the lease of the killed one has ended"
    keeper.close()


def test_worker_waits_for_a_name_whose_holder_may_be_gone_until_it_has_been_silent(here, name):
    holds(here, name, "another-boot/1:1:1", silent_after_s=1.5)

    keeper = a_keeper(here, name)
    keeper.start(max_attempts=5)

    assert row(here, name).instance == keeper.identity.instance
    keeper.close()


def test_worker_is_refused_once_a_holder_of_another_machine_is_heard_of(here, name):
    instance = holds(here, name, "another-boot/1:1:1")

    class HeardOf(LeaseKeeper):
        def _begins(self, max_attempts: int) -> bool:
            begins = super()._begins(max_attempts)
            with transaction(here.database) as session:
                query = text("UPDATE workers SET seen_at = clock_timestamp() WHERE name = :name")
                session.execute(query, {"name": name})
            return begins

    keeper = a_keeper(here, name)
    keeper.__class__ = HeardOf
    with pytest.raises(NameTaken):
        keeper.start(max_attempts=5)

    assert row(here, name).instance == instance


def test_worker_that_finds_its_name_taken_gives_up_its_jobs_and_says_so(here, name):
    keeper = a_keeper(here, name)
    lost = []
    keeper.on_name_lost = lambda: lost.append(1)
    keeper.start(max_attempts=5)
    job = here.accept()

    with keeper.leased(job.id) as held:
        with transaction(here.database) as session:
            query = text("UPDATE workers SET instance = :other WHERE name = :name")
            session.execute(query, {"other": uuid.uuid4(), "name": name})

        until(lambda: lost, what="that it notices")
        assert held.is_lost
    assert keeper.leaving == "another process has the name of this worker"
    keeper.close()
    left = row(here, name)
    assert left is not None, "it is not its own any more"
    with transaction(here.database) as session:
        workers.leave(session, name, left.instance)


_SERVE = """
from policy.current import CurrentFleet
from settings import WorkerSettings, load, load_fleet_or_exit
from tasks.roles import render

settings = load(WorkerSettings)
render.serve(settings, CurrentFleet(load_fleet_or_exit(settings)))
"""


def a_process(settings, name, **variables) -> subprocess.Popen:
    told = {
        key.upper(): str(getattr(settings, key))
        for key in ("database_url", "broker_url", "handoff_url")
    }
    told |= {"WORKER_NAME": name, "DEVICE": "cpu", **variables}
    return subprocess.Popen(
        [sys.executable, "-c", _SERVE],
        cwd=REPO,
        env=os.environ | told,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_worker_process_is_refused_before_it_has_loaded_anything(here, name, other):
    holds(here, name, processes.process_key(other.pid), pid=other.pid)

    process = a_process(here.settings, name)
    _, told = process.communicate(timeout=180)

    assert process.returncode == EX_CONFIG
    assert f"the name {name!r} is taken" in told
    assert "checkpoint_loaded" not in told


def a_fleet_file(tmp_path, source) -> str:
    text = (REPO / "fleet.toml").read_text().replace("pocket/checkpoint", source)
    (tmp_path / "fleet.toml").write_text(text)
    return str(tmp_path / "fleet.toml")


def test_worker_process_that_can_load_nothing_ends_with_its_sentence_and_leaves_it(
    here, name, tmp_path
):
    file = a_fleet_file(tmp_path, "nowhere")

    process = a_process(here.settings, name, FLEET_FILE=file, CHECKPOINT_ROOT=str(tmp_path))
    _, told = process.communicate(timeout=180)

    assert process.returncode == EX_CONFIG
    sentence = told.splitlines()[-1]
    assert sentence.startswith("model 'pocket', version ")
    assert f"({tmp_path}/nowhere) cannot be loaded" in sentence
    assert "fetch its files again" in sentence
    left = row(here, name)
    assert (left.state, left.problem) == ("failed", sentence)
    with transaction(here.database) as session:
        workers.leave(session, name, left.instance)


def test_worker_process_that_is_told_to_end_while_it_loads_ends_well_and_gives_its_name_up(
    here, name
):
    process = a_process(here.settings, name)
    until(lambda: row(here, name) is not None, within_s=120, what="its name")

    process.terminate()
    _, told = process.communicate(timeout=60)

    assert (process.returncode, row(here, name)) == (0, None)
    assert "terminate called" not in told
