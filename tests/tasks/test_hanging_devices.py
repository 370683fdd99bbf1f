"""A device that hangs or is lost ends its worker, whatever it does, within the limit of that.

No job is to blame.
"""

import dataclasses
import os
import pydoc
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

import tasks.watchdog
from edges.progress import ProgressWriter
from engine.engine import Engine
from engine.errors import DeviceLost
from engine.warmup import _plain_request
from policy import queues
from settings import EX_DEVICE_LOST, REPO
from tasks.roles import render
from tasks.watchdog import EX_SOFTWARE, Watchdog
from tests.builders import until
from tests.tasks.conftest import end_left_jobs

LIMIT_S = 0.5
# Its snapshots are taken from the second step on.
QUALITY = {"tier": "quality", "determinism": "reproducible", "bucket_rows": 2, "num_steps": 8}


def fails(*_, **__):
    raise RuntimeError("the test is over")


def fails_to_start(engine):
    with pytest.raises(RuntimeError):
        engine.start()


class Hang:
    """A call that does not return before the test allows it."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self._is_over = threading.Event()

    def __call__(self) -> None:
        self.begun.set()
        assert self._is_over.wait(120)

    def before(self, does):
        return lambda *args, **more: (self(), does(*args, **more))[1]

    def end(self) -> None:
        self._is_over.set()


@pytest.fixture
def hang():
    hang = Hang()
    yield hang
    hang.end()


@pytest.fixture
def exits(monkeypatch):
    """The statuses with which this process would have ended."""
    exits = []
    monkeypatch.setattr(tasks.watchdog, "LOOK_EVERY_S", 0.05)
    monkeypatch.setattr(tasks.watchdog.os, "_exit", exits.append)
    return exits


def a_watchdog(engine, **wiring) -> Watchdog:
    watchdog = Watchdog(stuck_after_s=LIMIT_S)
    watchdog.watch(engine)
    for name, part in wiring.items():
        setattr(watchdog, name, part)
    watchdog.start()
    return watchdog


@pytest.mark.parametrize("place", ["start", "predict", "preview", "decode", "save"])
def test_a_device_that_hangs_under_a_job_ends_its_worker_and_counts_no_try(
    here, monkeypatch, hang, exits, place
):
    monkeypatch.setattr(ProgressWriter, "is_watched", lambda *_: place == "preview")
    runner = here.engine._runner
    monkeypatch.setattr(runner, place, hang.before(getattr(runner, place)))
    job = here.accept(**(QUALITY if place == "save" else {}))

    thread = here.render(job)
    until(hang.begun.is_set, what=f"{place}, which hangs")
    a_watchdog(here.engine, give_back=here.parts.give_back)
    until(lambda: exits, what="the end of the worker")

    assert exits == [EX_DEVICE_LOST]
    row = here.row(job)
    assert (row.state, row.attempt, row.counted_attempts) == ("queued", 1, 0)
    hang.end()
    thread.join(timeout=60)


@pytest.mark.parametrize(("compiles", "ends"), [(True, False), (False, True)])
def test_a_warm_up_that_compiles_may_take_longer_than_other_turns(
    here, monkeypatch, hang, compiles, ends
):
    engine = here.engine
    [spec] = engine._checkpoints.specs.values()
    monkeypatch.setattr("engine.loop.warm_up", lambda *_, **__: iter(hang, None))
    monkeypatch.setattr("engine.loading.accelerate", lambda *_: None)
    watchdog = Watchdog(stuck_after_s=LIMIT_S, warm_up_stuck_after_s=3600)
    watchdog.watch(engine)

    came = engine.load(dataclasses.replace(spec, name="second@1", compile_blocks=compiles))
    until(lambda: engine.turn_s > LIMIT_S, what="a piece that takes long")
    found = watchdog._hang()
    hang.end()
    came.result(60)
    engine.unload("second@1").result(60)

    assert (found is not None) is ends
    assert not engine.is_compiling


def test_a_job_under_which_a_second_device_is_lost_counts_the_try(here):
    job = here.accept()

    for counted in (0, 1, 2):
        with here.keeper.leased(job.id) as held:
            here.renderer.verdicts.decide(held, DeviceLost("the device hangs"))

        row = here.row(job)
        assert (row.state, row.counted_attempts) == ("queued", counted)


@pytest.mark.parametrize(
    ("place", "status"),
    [
        ("engine.loading.accelerate", EX_SOFTWARE),
        ("engine.loop.warm_up", EX_DEVICE_LOST),
        ("engine.loads.Loads._take_out", EX_DEVICE_LOST),
    ],
)
def test_a_device_that_hangs_as_a_checkpoint_comes_or_goes_ends_its_worker(
    here, monkeypatch, hang, exits, place, status
):
    engine = here.engine
    [spec] = engine._checkpoints.specs.values()
    monkeypatch.setattr("engine.loop.warm_up", lambda *_, **__: iter([None]))
    monkeypatch.setattr(place, hang.before(pydoc.locate(place)))

    came = engine.load(dataclasses.replace(spec, name="second@1"))
    if "_take_out" in place:
        came.result(60)
        engine.unload("second@1")
    until(hang.begun.is_set, what=f"{place}, which hangs")
    a_watchdog(engine)
    until(lambda: exits, what="the end of the worker")
    hang.end()
    came.result(60)
    if "_take_out" not in place:
        engine.unload("second@1").result(60)

    assert exits == [status]
    assert engine.load_silent_s == 0


@pytest.mark.parametrize(
    ("place", "status"),
    [
        ("engine.device.Device.prepare", EX_DEVICE_LOST),
        ("engine.loading.accelerate", EX_SOFTWARE),
        ("engine.runner.Runner.predict", EX_DEVICE_LOST),
    ],
)
def test_a_device_that_hangs_before_its_worker_is_ready_ends_it(
    here, monkeypatch, hang, exits, place, status
):
    [spec] = here.engine._checkpoints.specs.values()
    engine = Engine(here.engine.config, [spec])
    monkeypatch.setattr(place, hang.before(fails))

    start = threading.Thread(target=fails_to_start, args=(engine,))
    start.start()
    until(hang.begun.is_set, what=f"{place}, which hangs")
    a_watchdog(engine)
    until(lambda: exits, what="the end of the worker")
    hang.end()
    start.join(timeout=60)

    assert exits == [status]


def test_an_engine_whose_device_hangs_keeps_nobody_waiting_who_stops_it(here, monkeypatch, hang):
    [spec] = here.engine._checkpoints.specs.values()
    monkeypatch.setattr("engine.loop.warm_up", lambda *_, **__: iter([None]))
    with Engine(here.engine.config, [spec]) as engine:
        monkeypatch.setattr(engine._runner, "start", hang.before(engine._runner.start))
        engine.submit(_plain_request(spec, *spec.sizes[0]))
        until(hang.begun.is_set, what="an encode that hangs")

        engine.stop(within_s=0.1)

        assert engine.turn_s > 0, "it still hangs"
        hang.end()


class Ended(Exception):
    """Instead of the end of this process; its argument is the status."""


@pytest.fixture
def ends(monkeypatch):
    def end(status):
        raise Ended(status)

    monkeypatch.setattr(render, "_end_at_once", end)


def test_a_worker_whose_device_is_lost_as_it_loads_ends_with_a_status_of_its_own(
    here, monkeypatch, ends
):
    def loses_it(*_):
        raise DeviceLost("an illegal memory access")

    told = SimpleNamespace(fail=lambda problem: None)
    monkeypatch.setattr(render, "_start_engine", loses_it)

    with pytest.raises(Ended, match=str(EX_DEVICE_LOST)):
        render._load_or_end(here.settings, here.parts.fleet, told, None, None, None)


def test_a_worker_whose_gpu_is_off_the_bus_ends_with_that_status(here, monkeypatch, ends):
    def fails(settings):
        raise RuntimeError("No CUDA GPUs are available")

    monkeypatch.setattr(render, "device_name", fails)

    with pytest.raises(Ended, match=str(EX_DEVICE_LOST)):
        render._check_device(here.settings, here.parts.fleet)


def test_a_worker_whose_device_is_lost_between_jobs_leaves_with_that_status(here, monkeypatch):
    engine = here.engine
    monkeypatch.setattr(engine._loop, "is_device_lost", True)
    monkeypatch.setattr(render, "consume", lambda *_, **__: 0)
    monkeypatch.setattr(engine, "stop", lambda within_s: None)  # other tests go on with it
    settings = here.settings.model_copy(update={"worker_name": "cpu6@here"})
    parts = render.build(settings, here.parts.fleet, engine=engine, when_empty=lambda: None)

    assert render._take_jobs(parts, []) == EX_DEVICE_LOST

    parts.renderer.database.dispose()


_HANGS = """
import threading
import engine.loop
import tasks.preemption
from engine.runner import Runner
from policy.current import CurrentFleet
from settings import WorkerSettings, load, load_fleet_or_exit
from tasks.roles import render

engine.loop.warm_up = lambda *_, **__: iter([None])
Runner.predict = lambda *_: (print("it hangs", flush=True), threading.Event().wait())
tasks.preemption.ENDS_WITHIN_S = 1
settings = load(WorkerSettings)
render.serve(settings, CurrentFleet(load_fleet_or_exit(settings)))
"""


def test_a_worker_whose_device_hangs_ends_when_it_is_told_to_and_gives_its_job_back(here, tmp_path):
    end_left_jobs(here.database)
    settings, job = here.settings, here.accept()
    told = {
        key.upper(): str(getattr(settings, key))
        for key in ("database_url", "broker_url", "handoff_url")
    }
    told |= {"WORKER_NAME": "hangs@here", "DEVICE": "cpu", "SHUTDOWN_NOTICE_S": "1"}
    told |= {"FOLLOW_REVISIONS": "false"}
    log = tmp_path / "log"
    with log.open("wb") as output:
        command = [sys.executable, "-c", _HANGS]
        process = subprocess.Popen(command, cwd=REPO, env=os.environ | told, stdout=output)
    try:
        here.renderer.broker.announce(queues.RENDER_JOB, "local.fast", job.id, num_images=1)
        until(lambda: "it hangs" in log.read_text(), within_s=120, what="a step that hangs")
        assert here.row(job).state == "running"

        process.send_signal(signal.SIGTERM)

        assert process.wait(timeout=60) == EX_SOFTWARE
    finally:
        process.kill()
        process.wait()
    row = here.row(job)
    assert (row.state, row.worker, row.counted_attempts) == ("queued", None, 0)
