"""supervisord as the stack uses it.

What it is told again, what it hands on, and whose processes it never touches.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
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


def test_program_that_ends_with_a_final_status_is_not_started_again_and_others_are(supervisor):
    script = "echo started; sleep 1.5; exit"
    final = Program(
        name="final",
        command=("sh", "-c", f"{script} 78"),
        directory=Path("/"),
        priority=1,
        final_statuses=(78,),
    )
    other = replace(final, name="other", command=("sh", "-c", f"{script} 1"))
    supervisor.run([final, other])
    for program in (final, other):
        supervisor.start(program.name)

    until(lambda: len(told(supervisor, "other")) >= 3, what="its third start")

    ended = {status.name: status for status in supervisor.status()}["final"]
    assert (ended.state, ended.exit_status) == ("exited", 78)
    assert told(supervisor, "final") == ["started"]


def test_last_words_of_a_process_are_the_plain_lines_at_the_end_of_its_log(supervisor):
    supervisor.log_dir.mkdir()
    log = supervisor.log_path("worker-1")
    log.write_text('plain\n{"event": "loads"}\nmodel a is broken\nmodel b, too\n')

    words = "\n  worker-1 | model a is broken\n  worker-1 | model b, too"
    assert supervisor.last_words("worker-1") == words

    log.write_text('{"event": "died"}\n')
    assert supervisor.last_words("worker-1") == '\n  worker-1 | {"event": "died"}'
