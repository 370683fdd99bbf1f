"""Whether a process that had a name is really gone."""

import os
import signal
import subprocess
import sys

import pytest

from edges import processes


@pytest.fixture
def other():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def test_a_process_that_runs_is_not_gone(other):
    key = processes.process_key(other.pid)

    assert processes.is_running(key)
    assert not processes.is_gone(key)


def test_a_killed_process_is_gone_before_and_after_it_is_waited_for(other):
    key = processes.process_key(other.pid)

    os.kill(other.pid, signal.SIGKILL)
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    assert processes.is_gone(key), "a zombie"
    other.wait()

    assert processes.is_gone(key)
    assert not processes.is_running(key)


def test_a_later_process_with_the_same_id_does_not_stand_for_the_one_before(other):
    key = processes.process_key(other.pid)
    earlier = f"{key.rpartition(':')[0]}:1"

    assert processes.is_gone(earlier)
    assert not processes.is_running(earlier)


@pytest.mark.parametrize("key", ["", "another-boot/1:1:1", "nonsense"])
def test_of_a_process_of_elsewhere_nothing_is_known(key):
    assert not processes.is_gone(key)
    assert not processes.is_running(key)
