"""A backup of a running stack makes another one in an empty place.

The same keys, jobs, images and audit log.
"""

import hashlib
import json
import shutil
import stat
import tempfile
import time
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner

from cli.main import darkroom
from cli.sql import ask
from darkroom_client import Client
from fleet import backup
from fleet.addresses import Addresses
from fleet.stack import Stack, StackError
from tests.builders import until


@pytest.fixture(scope="module")
def place():
    """Not below pytest's own folder, for Postgres passes through it under an account of its own."""
    place = Path(tempfile.mkdtemp(prefix="darkroom-backup-"))
    yield place
    shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(scope="module")
def job(client):
    """A job of the running stack that succeeded."""
    return client.wait(client.create_job("a red circle", tier="fast", seed=7, n=2).id)


@pytest.fixture(scope="module")
def folder(stack, job, place):
    """A backup of the running stack."""
    done = CliRunner().invoke(
        darkroom, ["--data-dir", str(stack.data_dir), "backup", str(place / "backup")]
    )
    assert done.exit_code == 0, done.output
    return place / "backup"


@pytest.fixture(scope="module")
def restored(stack, folder, place):
    """The stack of the backup, beside the one that it was made of: its services and its gateway."""
    done = CliRunner().invoke(darkroom, ["--data-dir", str(place / "data"), "restore", str(folder)])
    assert done.exit_code == 0, done.output
    restored = Stack(place / "data")
    assert not restored.is_up()
    with restored._lock():
        restored._migrate(restored._up_services(time.monotonic() + 120))
    restored.start("gateway")
    until(lambda: answers(restored.env["DARKROOM_URL"]), within_s=60, what="the restored gateway")
    yield restored
    restored.down()


def answers(url):
    try:
        return httpx.get(f"{url}/healthz", trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def test_a_restored_stack_knows_keys_jobs_and_images(stack, restored, job, tmp_path):
    # its ports were taken: both run
    assert restored.env["DARKROOM_URL"] != stack.env["DARKROOM_URL"]
    with Client(restored.env["DARKROOM_URL"], stack.env["DARKROOM_API_KEY"]) as client:
        known = client.job(job.id)
        paths = client.download(known, tmp_path)

    assert (known.state, known.prompt) == ("succeeded", "a red circle")
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)]
    assert digests == [image.content_sha256 for image in job.images]


def test_a_restored_stack_takes_new_jobs(restored):
    with Client(restored.env["DARKROOM_URL"], restored.env["DARKROOM_API_KEY"]) as client:
        job = client.create_job("a blue square", tier="batch")
        assert client.job(job.id).state == "queued"


def test_a_restored_audit_log_verifies_and_stays_closed(restored):
    assert ask(restored.env["AUDITOR_DATABASE_URL"], "SELECT * FROM audit_verify()").rows == []
    assert ask(restored.env["AUDITOR_DATABASE_URL"], "SELECT count(*) > 0 FROM audit_log").rows == [
        (True,)
    ]
    for statement in ("DELETE FROM audit_events", "UPDATE audit_events SET actor = 'x'"):
        with pytest.raises(Exception, match="append-only"):
            ask(restored.env["MIGRATION_DATABASE_URL"], statement)
        with pytest.raises(Exception, match="permission denied"):
            ask(restored.env["DATABASE_URL"], statement)


def test_a_backup_is_for_its_owner_only_and_tells_what_it_holds(folder, stack):
    manifest = backup.Manifest.read(folder)

    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "env").stat().st_mode) == 0o600
    assert (manifest.objects >= 2, {"darkroom_app", "darkroom_auditor"} <= set(manifest.roles)) == (
        True,
        True,
    )
    assert stack.env["API_KEY_PEPPER"] in (folder / "env").read_text()


def test_a_backup_goes_into_a_folder_of_its_own(stack, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")

    with pytest.raises(StackError, match="is not empty"):
        stack.back_up(tmp_path)


def test_a_backup_is_restored_into_a_new_data_directory_only(stack, folder):
    with pytest.raises(StackError, match="new data directory"):
        stack.restore(folder)


@pytest.fixture
def another_folder(folder, tmp_path):
    """A copy of the backup, to be damaged."""
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_folder_without_its_manifest_is_no_backup(another_folder, tmp_path):
    (another_folder / "manifest.json").unlink()

    with pytest.raises(StackError, match="not a whole backup"):
        Stack(tmp_path / "data").restore(another_folder)
    assert not (tmp_path / "data").exists()


def test_a_dump_that_was_altered_is_not_restored(another_folder, tmp_path):
    with (another_folder / "database.dump").open("ab") as file:
        file.write(b"x")

    with pytest.raises(StackError, match="its digest is another one"):
        Stack(tmp_path / "data").restore(another_folder)
    assert not (tmp_path / "data").exists()


def test_objects_are_checked_by_the_digest_in_their_name(another_folder, tmp_path):
    altered = next(path for path in (another_folder / "objects").rglob("*") if path.is_file())
    altered.write_bytes(b"not what was written")

    with pytest.raises(StackError, match=f"{altered.name} is not what was written there"):
        list(backup._copy_objects(another_folder / "objects", tmp_path / "bucket", is_whole=True))
    whole = json.loads((another_folder / "manifest.json").read_text())["objects"]
    assert (
        len(
            list(
                backup._copy_objects(
                    another_folder / "objects", tmp_path / "another", is_whole=False
                )
            )
        )
        == whole - 1
    )


def test_a_backup_that_lacks_an_object_is_not_restored_as_if_it_were_whole(
    another_folder, tmp_path, monkeypatch
):
    next(path for path in (another_folder / "objects").rglob("*") if path.is_file()).unlink()
    whole = backup.Manifest.read(another_folder).objects
    for name in ("_make_roles", "_run"):  # what Postgres gets is not at issue
        monkeypatch.setattr(backup, name, lambda *_: None)

    with pytest.raises(StackError, match=f"it has {whole - 1} of {whole} objects"):
        backup.read(another_folder, data_dir=tmp_path, addresses=Addresses.fresh())


@pytest.mark.parametrize("name", ["database.dump", "env", "objects"])
def test_a_folder_that_lacks_a_part_is_no_backup(another_folder, tmp_path, name):
    path = another_folder / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()

    with pytest.raises(StackError, match=f"not a whole backup: {name} is missing"):
        Stack(tmp_path / "data").restore(another_folder)
    assert not (tmp_path / "data").exists()


def test_a_backup_copies_objects_after_its_dump_and_is_one_only_when_it_is_whole(
    tmp_path, monkeypatch
):
    data, made = tmp_path / "data", []
    (data / "s3" / "darkroom").mkdir(parents=True)
    (data / "env").write_text("API_KEY_PEPPER=x\n")
    (tmp_path / "fleet.toml").write_text("")
    copy_objects = backup._copy_objects

    def dump(program, addresses, *options):
        made.append("dump")
        (tmp_path / "backup" / "database.dump").write_bytes(b"rows")

    def copy(*folders, is_whole):
        made.append("objects")
        assert not (tmp_path / "backup" / "manifest.json").exists()
        return copy_objects(*folders, is_whole=is_whole)

    monkeypatch.setattr(backup, "_run", dump)
    monkeypatch.setattr(backup, "_facts", lambda addresses: ("0042", "16.2", ["darkroom_app"]))
    monkeypatch.setattr(backup, "_copy_objects", copy)

    manifest = backup.write(
        tmp_path / "backup",
        data_dir=data,
        addresses=Addresses.fresh(),
        fleet_file=tmp_path / "fleet.toml",
    )

    assert made == ["dump", "objects"]
    assert backup.check(tmp_path / "backup") == manifest
    assert (manifest.revision, manifest.objects, manifest.object_bytes) == ("0042", 0, 0)


def test_a_stack_that_does_not_run_is_not_backed_up(tmp_path):
    done = CliRunner().invoke(
        darkroom, ["--data-dir", str(tmp_path / "data"), "backup", str(tmp_path / "backup")]
    )

    assert done.exit_code == 5
    assert "not running" in done.stderr
    assert not (tmp_path / "backup").exists()
