"""supervisord as the stack uses it.

What it is told again, what it hands on, and whose processes it never touches.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fleet import supervision
from fleet.errors import StackError
from fleet.supervision import Program, Supervisor
from tests.builders import until

TELL = 'echo "$SAID,$HOME,$SECRET_OF_THE_CALLER,$CUDA_VISIBLE_DEVICES,"; exec sleep 60'


@pytest.fixture
def supervisor(monkeypatch):
    """One of its own, started from a shell with a secret in it."""
    monkeypatch.setenv("HOME", "/elsewhere/caller")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    monkeypatch.setenv("SECRET_OF_THE_CALLER", "s3cret")
    folder = Path(tempfile.mkdtemp(prefix="darkroom-tests-"))
    supervisor = Supervisor(folder)
    yield supervisor
    supervisor.shut_down()
    shutil.rmtree(folder)


def a_program(name="teller", said="", command=("sh", "-c", TELL)) -> Program:
    return Program(
        name=name, command=command, directory=Path("/"), environment={"SAID": said}, priority=1
    )


def told(supervisor, name="teller") -> list[str]:
    path = supervisor.log_path(name)
    return path.read_text().splitlines() if path.exists() else []


def states(supervisor) -> dict[str, str]:
    return {status.name: status.state for status in supervisor.status()}


def test_programs_that_changed_run_with_their_new_settings_and_the_others_are_left_alone(
    supervisor,
):
    supervisor.run([a_program(said="one"), a_program("other"), a_program("gone")])
    for name in ("teller", "other", "gone"):
        supervisor.start(name)
    until(
        lambda: told(supervisor) and set(states(supervisor).values()) == {"running"},
        what="three programs",
    )
    before = {status.name: status.pid for status in supervisor.status()}

    supervisor.run([a_program(said="two"), a_program("other")])
    assert states(supervisor) == {"teller": "stopped", "other": "running"}
    supervisor.start("teller")

    until(lambda: len(told(supervisor)) == 2, what="its second start")
    assert [line.partition(",")[0] for line in told(supervisor)] == ["one", "two"]
    assert {status.name: status.pid for status in supervisor.status()}["other"] == before["other"]
    assert not Path(f"/proc/{before['gone']}").exists()


def test_programs_get_their_own_variables_and_the_caller_s_of_machine_and_devices_only(
    supervisor,
):
    odd = "50%, $HOME; a,b"
    supervisor.run([a_program(said=odd)])
    supervisor.start("teller")
    until(lambda: told(supervisor), what="its line")

    assert told(supervisor) == [f"{odd},/elsewhere/caller,,2,"]


@pytest.mark.parametrize("value", ['a"b', "a\nb", "a ;b", "a #b"])
def test_a_value_that_supervisord_would_misread_is_refused(tmp_path, value):
    with pytest.raises(StackError):
        Supervisor(tmp_path).run([a_program(said=value)])


def test_a_process_whose_id_stands_in_a_stale_file_is_not_ended(tmp_path):
    """After a crash of the machine the number may be anybody's."""
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (tmp_path / "supervisord.pid").write_text(str(bystander.pid))

    Supervisor(tmp_path).shut_down()

    try:
        assert bystander.poll() is None
        assert not (tmp_path / "supervisord.pid").exists()
    finally:
        bystander.kill()
        bystander.wait()


def test_socket_is_not_put_into_a_folder_of_somebody_else(tmp_path, monkeypatch):
    """It is below the temporary directory where the data directory is too deep, and whoever can
    enter it controls everything.
    """
    theirs, link = tmp_path / "theirs", tmp_path / "link"
    theirs.mkdir()
    link.symlink_to(theirs)

    with pytest.raises(StackError, match="belongs to somebody else"):
        supervision._make_private(link)
    supervision._make_private(theirs)
    monkeypatch.setattr(os, "geteuid", lambda: theirs.stat().st_uid + 1)
    with pytest.raises(StackError, match="belongs to somebody else"):
        supervision._make_private(theirs)


def test_data_directories_that_are_too_deep_have_sockets_of_their_own_in_a_short_place():
    deep = [Path("/" + "deep/" * 30 + name) for name in ("one", "two")]

    sockets = [supervision._socket_path(path) for path in deep]

    assert len(set(sockets)) == 2
    assert all(
        len(str(path)) <= 107 and path.is_relative_to(tempfile.gettempdir()) for path in sockets
    )
