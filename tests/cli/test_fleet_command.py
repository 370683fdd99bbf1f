"""`darkroom fleet` beside a revision of another release, and models that memory never holds."""

from collections.abc import Iterator

import pytest
from click.testing import CliRunner, Result

from cli.main import darkroom
from models import revisions, tenants
from models.database import transaction
from tests.builders import a_closed_port, fleet_text
from tests.models.conftest import Database, a_database


@pytest.fixture(scope="module")
def unreadable(stack) -> Iterator[Database]:
    """A database whose newest revision has a key that this release does not know."""
    with a_database(stack.env) as database:
        with transaction(database.app) as session:
            revisions.apply(session, fleet_text({"from_tomorrow": 1}), actor="tests")
        yield database


@pytest.fixture
def run(unreadable, tmp_path, monkeypatch):
    file = tmp_path / "fleet.toml"
    url = unreadable.app.url.render_as_string(hide_password=False)
    monkeypatch.setenv("DATABASE_URL", url)

    def run(command: str, changes=None) -> Result:
        file.write_text(fleet_text(changes))
        given = ["--data-dir", str(tmp_path), "fleet", command, str(file)]
        return CliRunner().invoke(darkroom, given)

    return run


@pytest.mark.parametrize("command", ["diff", "apply"])
def test_fleet_command_works_against_a_revision_that_this_release_cannot_read(run, command):
    done = run(command)

    assert done.exit_code == 0, done.output
    assert "this release cannot read it" in done.output
    assert "from_tomorrow" in done.output


def test_fleet_apply_puts_a_text_in_force_that_this_release_can_read(run, unreadable):
    run("apply")

    with transaction(unreadable.app) as session:
        newest = revisions.newest(session)
        assert newest is not None
        assert newest.content == fleet_text()


@pytest.mark.parametrize("command", ["check", "diff", "apply"])
def test_fleet_command_warns_of_pools_for_tenants_that_are_not_there(run, unreadable, command):
    known = f"acme-{command}"
    with transaction(unreadable.app) as session:
        tenants.create(session, name=known, actor="tests")

    done = run(command, {"pools.big.tenants": [known, f"acne-{command}"]})

    assert done.exit_code == 0, done.output
    assert f"warning: pools.big.tenants: there is no tenant 'acne-{command}'" in done.stderr
    assert f"there is no tenant '{known}'" not in done.output


def test_fleet_check_works_without_a_database(run, monkeypatch):
    monkeypatch.setenv("DATABASE_URL", f"postgresql://nobody@127.0.0.1:{a_closed_port()}/none")

    done = run("check", {"pools.big.tenants": ["acme"]})

    assert done.exit_code == 0, done.output
    assert "names of tenants were not checked" in done.stderr
    assert "nothing is wrong" in done.stdout


def test_fleet_check_names_a_version_that_the_memory_of_its_pool_never_holds(run):
    budget = {"pools.local.residency": "lru", "pools.local.device_memory_gb": 0.001}

    done = run("check", budget)

    assert done.exit_code == 1
    assert (
        "pools.local.device_memory_gb: 0.001 is less than the 0.0204 GB of the weights of pocket@1"
    ) in done.output
