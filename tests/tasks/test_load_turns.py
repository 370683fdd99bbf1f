"""Loads of one host take turns, and no turn is waited for too long."""

import signal
import subprocess
import sys
import threading
import time

import pytest

from settings import REPO
from tasks.loadturns import LoadTurns
from tests.builders import until

HOLDS = """
import pathlib, sys, time
from tasks.loadturns import LoadTurns
with LoadTurns(pathlib.Path(sys.argv[1])).turn():
    print("has it", flush=True)
    time.sleep(120)
"""


@pytest.fixture
def file(tmp_path):
    return tmp_path / "turn"


@pytest.fixture
def holder(file):
    """Another process that has the turn."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, file], cwd=REPO, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "has it\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_loads_that_share_a_file_never_overlap(file):
    loading, most = [], []

    def load():
        with LoadTurns(file).turn():
            loading.append(1)
            most.append(len(loading))
            time.sleep(0.02)
            loading.pop()

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)

    assert most == [1, 1, 1, 1]


def test_a_load_waits_for_another_process_and_says_so_until_it_has_its_turn(file, holder):
    told, had = [], threading.Event()

    def load():
        with LoadTurns(file, tell=told.append).turn():
            had.set()

    thread = threading.Thread(target=load)
    thread.start()
    until(lambda: told, what="a word of it")
    assert not had.is_set()
    holder.send_signal(signal.SIGKILL)  # the turn of a process that dies is over

    assert had.wait(60)
    thread.join(timeout=60)
    assert told == ["waits for another worker of this host to load", ""]


def test_a_load_goes_on_without_its_turn_when_another_keeps_it_for_too_long(file, holder):
    with LoadTurns(file, waits_at_most_s=0.1).turn():
        assert holder.poll() is None


def test_a_load_goes_on_without_its_turn_where_the_file_cannot_be_opened(tmp_path):
    with LoadTurns(tmp_path / "nowhere" / "turn").turn():
        pass
