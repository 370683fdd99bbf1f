"""A launcher gives no worker to a GPU that was lost twice, until an operator releases it.

The GPUs are simulated: a program named nvidia-smi, and workers that end as one whose GPU is lost.
"""

import re

import pytest
from click.testing import CliRunner

from cli.main import darkroom
from fleet.quarantine import Quarantine
from models.database import transaction
from models.quarantine import Loss
from settings import EX_DEVICE_LOST
from tests.builders import a_closed_port, until
from tests.fleet.test_worker import launched, nvidia_smi

BROKEN = "GPU-bbbbbbbb"
SOUND = "GPU-cccccccc"
TWO_GPUS = f"""
echo "GPU 0: NVIDIA H200 (UUID: {BROKEN})"
echo "GPU 1: NVIDIA H200 (UUID: {SOUND})"
"""
WORKER = (
    "import os, sys, time; gpu = os.environ['CUDA_VISIBLE_DEVICES']; "
    "os.write(1, f'started on {gpu}\\n'.encode()); "
    f"gpu != '{BROKEN}' or sys.exit({EX_DEVICE_LOST}); time.sleep(120)"
)


@pytest.fixture
def shown(here):
    """Rows of `workers_now` of the GPU that breaks."""

    def shown():
        with transaction(here.database) as session:
            query = f"SELECT state, worker, problem FROM workers_now WHERE device = '{BROKEN}'"
            return session.connection().exec_driver_sql(query).all()

    return shown


def starts(tmp_path, gpu):
    return len(re.findall(f"started on {gpu}", (tmp_path / "log").read_text()))


def test_a_gpu_that_was_lost_twice_gets_no_worker_until_it_is_released(
    here, shown, tmp_path, monkeypatch
):
    path = nvidia_smi(tmp_path, TWO_GPUS)
    told = {"PATH": path, "CUDA_VISIBLE_DEVICES": None, "WORKER_NAME": ""}
    told |= {"DATABASE_URL": here.settings.database_url}

    with launched(tmp_path, WORKER, **told) as process:
        [(state, name, problem)] = until(shown, what="its quarantine")
        until(lambda: "lost twice" in (tmp_path / "log").read_text(), what="a word of it")
        assert (state, starts(tmp_path, BROKEN)) == ("quarantined", 2)
        assert name.startswith("local-gpu-bbbbbbbb@")
        assert f"darkroom workers release {BROKEN}" in problem
        assert (process.poll(), starts(tmp_path, SOUND)) == (None, 1)

    with launched(tmp_path, WORKER, **told):
        until(lambda: "lost twice" in (tmp_path / "log").read_text(), what="that it is remembered")
        until(lambda: starts(tmp_path, SOUND), what="the worker of the sound one")
        assert starts(tmp_path, BROKEN) == 0

        monkeypatch.setenv("DATABASE_URL", here.settings.database_url)
        told_to = CliRunner().invoke(darkroom, ["workers", "release", name])
        assert (told_to.exit_code, BROKEN in told_to.output) == (0, True)

        until(lambda: starts(tmp_path, BROKEN), what="a worker on it")
    assert CliRunner().invoke(darkroom, ["workers", "release", "GPU-none"]).exit_code == 4


def test_a_launcher_goes_by_what_it_has_seen_while_postgres_is_away():
    nowhere = Quarantine(f"postgresql+psycopg2://x@127.0.0.1:{a_closed_port()}/x", [BROKEN, SOUND])
    assert not nowhere.may_start(BROKEN), "Postgres was not asked"
    nowhere.start()
    until(lambda: nowhere.may_start(BROKEN), what="that it cannot be asked")

    for loss in range(2):
        assert not nowhere.is_quarantined(BROKEN)
        nowhere.note_loss(
            Loss(device=BROKEN, worker="w", pool="p", capacity_class="", host="h", pid=loss)
        )
        if loss == 0:
            until(lambda: nowhere.may_start(BROKEN), what="that it cannot be told")

    assert nowhere.is_quarantined(BROKEN)
    assert not nowhere.may_start(BROKEN)
    assert nowhere.may_start(SOUND)
    nowhere.close()
