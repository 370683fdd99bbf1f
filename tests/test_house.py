"""The walls of the house: who imports whom, who reads the environment, who never loads torch."""

import ast
import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edges.broker import VERBS, make_celery
from policy import queues
from policy.fleet import parse_fleet
from settings import REPO, BrokerSettings
from tests.builders import until
from tests.test_settings import ENOUGH

ROOMS = (
    "app",
    "tasks",
    "dispatch",
    "engine",
    "models",
    "policy",
    "edges",
    "fleet",
    "cli",
    "migrations",
    "darkroom_client",
)
DOOR = ("settings", "celeryconfig")
HOUSE = {*ROOMS, *DOOR, "pocket", "tests", "benchmarks"}

# Which rooms and doors each room knows; fleet and cli run the house and may know all of it.
KNOWS = {
    "app": {"models", "policy", "edges", "dispatch", "settings"},
    "tasks": {"models", "policy", "edges", "dispatch", "engine", "settings", "fleet.consumer"},
    "dispatch": {"models", "policy", "edges"},
    "engine": set(),
    "models": {"policy"},
    "policy": set(),
    "edges": {"models", "policy", "settings", "celeryconfig"},
    "migrations": {"models", "settings"},
    "darkroom_client": set(),
}
# Libraries that a room has never heard of, and where only a few are known, which.
NEVER_HEARD_OF = {
    "app": {"torch", "diffusers", "transformers", "celery", "kombu", "redis", "boto3"},
    "tasks": {"flask", "boto3", "redis"},
    "engine": {
        "flask",
        "celery",
        "kombu",
        "sqlalchemy",
        "redis",
        "boto3",
        "pydantic",
        "pydantic_settings",
        "httpx",
    },
    "dispatch": {
        "flask",
        "torch",
        "diffusers",
        "transformers",
        "celery",
        "kombu",
        "redis",
        "boto3",
    },
    "edges": {"flask", "torch", "diffusers", "transformers"},
}
KNOWS_ONLY = {"models": {"sqlalchemy"}, "policy": {"pydantic"}, "darkroom_client": {"httpx"}}
DOES_IO = {
    "os",
    "io",
    "pathlib",
    "shutil",
    "tempfile",
    "socket",
    "subprocess",
    "urllib",
    "http",
    "sqlite3",
    "logging",
}
DOES_IO |= {"threading", "asyncio", "time", "random"}


def modules(room: str) -> list[Path]:
    return sorted((REPO / room).rglob("*.py"))


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports(path: Path) -> Iterator[str]:
    """Dotted names of everything that a module imports, wherever in it."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where a name comes from"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported(room: str) -> set[tuple[str, str]]:
    """(file, dotted name) of every import of a room."""
    return {(str(path.relative_to(REPO)), name) for path in modules(room) for name in imports(path)}


def strangers_of(folder: str, unknown: set[str]) -> set[tuple[str, str]]:
    """Imports of a folder that lie under one of the dotted names that it must not know."""
    return {
        (file, name)
        for file, name in imported(folder)
        if any(f"{name}.".startswith(f"{each}.") for each in unknown)
    }


def top(name: str) -> str:
    return name.partition(".")[0]


@pytest.mark.parametrize("room", KNOWS)
def test_a_room_knows_only_the_rooms_below_it(room):
    allowed = {room, *KNOWS[room]}

    strangers = {
        (file, name)
        for file, name in imported(room)
        if top(name) in HOUSE
        and not any(name == known or name.startswith(f"{known}.") for known in allowed)
    }

    assert strangers == set()


@pytest.mark.parametrize("room", NEVER_HEARD_OF)
def test_a_room_has_never_heard_of(room):
    assert {
        (file, name) for file, name in imported(room) if top(name) in NEVER_HEARD_OF[room]
    } == set()


@pytest.mark.parametrize("room", KNOWS_ONLY)
def test_a_room_knows_one_library_only(room):
    libraries = {
        (file, name)
        for file, name in imported(room)
        if top(name) not in {*sys.stdlib_module_names, *HOUSE}
    }

    assert {(file, name) for file, name in libraries if top(name) not in KNOWS_ONLY[room]} == set()


def test_decisions_do_no_io_and_ask_no_clock():
    assert {(file, name) for file, name in imported("policy") if top(name) in DOES_IO} == set()
    for path in modules("policy"):
        calls = {
            ast.unparse(node.func) for node in ast.walk(parsed(path)) if isinstance(node, ast.Call)
        }
        assert not calls & {"open", "print", "input", "datetime.now", "datetime.utcnow"}, path


def test_documents_know_neither_requests_nor_rows():
    unknown = {"flask", "sqlalchemy", "models.tables", "app.http.views", "app.runtime"}

    assert strangers_of("app/schemas", unknown) == set()


def test_use_cases_know_no_request():
    assert strangers_of("app/services", {"flask", "werkzeug", "app.http", "app.openai"}) == set()


def test_app_live_knows_neither_requests_nor_use_cases():
    assert (
        strangers_of("app/live", {"flask", "werkzeug", "app.http", "app.openai", "app.services"})
        == set()
    )


@pytest.mark.parametrize("folder", ["app/http", "app/openai"])
def test_routes_leave_transactions_to_use_cases(folder):
    names_the_error = {("app/http/errors.py", "models.database.conflict")}

    assert strangers_of(folder, {"models.database", "sqlalchemy.orm"}) - names_the_error == set()


def test_one_module_of_edges_knows_celery():
    assert {file for file, name in imported("edges") if top(name) in ("celery", "kombu")} == {
        "edges/broker.py"
    }


def test_one_place_of_edges_makes_foreign_errors_ours():
    """`with wrap(theirs, ours):` does; a handler is for what else is to be done about an error."""
    by_hand = {
        (str(path.relative_to(REPO)), node.lineno)
        for path in modules("edges")
        if path.name != "errors.py"
        for handler in ast.walk(parsed(path))
        if isinstance(handler, ast.ExceptHandler)
        for node in ast.walk(handler)
        if isinstance(node, ast.Raise)
        and node.exc is not None
        and re.search(r"Unavailable\(|__name__", ast.unparse(node.exc))
    }

    assert by_hand == set()


def test_one_place_connects_to_redis():
    """Else a server that was demoted keeps the client.

    What Celery and kombu connect is their own.
    """
    client = re.compile(r"(\w+\.)*((Strict)?Redis|\w*ConnectionPool|from_url)(\.from_url)?")
    connecting = {
        str(path.relative_to(REPO))
        for room in (*ROOMS, "deploy", "pocket")
        for path in modules(room)
        if any(top(name) == "redis" for name in imports(path))
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Call) and client.fullmatch(ast.unparse(node.func))
    }

    assert connecting == {"edges/connections.py"}


@pytest.mark.parametrize(
    "room", ["app", "tasks", "dispatch", "models", "policy", "edges", "engine"]
)
def test_only_settings_read_the_environment(room):
    readers = set()
    for path in modules(room):
        for node in ast.walk(parsed(path)):
            reads = isinstance(node, ast.Attribute) and ast.unparse(node) in (
                "os.environ",
                "os.getenv",
                "os.environb",
            )
            if reads or (
                isinstance(node, ast.ImportFrom)
                and node.module == "os"
                and {"environ", "getenv"} & {a.name for a in node.names}
            ):
                readers.add((str(path.relative_to(REPO)), getattr(node, "lineno", 0)))
    writers = {
        (str(path.relative_to(REPO)), node.lineno)
        for path in modules(room)
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Subscript)
        and isinstance(node.ctx, ast.Store)
        and ast.unparse(node.value) == "os.environ"
    }

    assert readers - writers == set()


APPENDS = {"audit.append", "audit.append_of_attempt", "cancel_locked"}


@functools.cache
def writers() -> set[str]:
    """Functions of `models` that append to the audit log, as callers name them.

    Who calls one locks more than one row.
    """
    found = set()
    for path in sorted((REPO / "models").glob("*.py")):
        for function in (node for node in parsed(path).body if isinstance(node, ast.FunctionDef)):
            calls = {
                ast.unparse(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)
            }
            found |= {f"{path.stem}.{function.name}"} if calls & APPENDS else set()
    return found


def test_writes_of_a_request_are_tried_again_when_they_conflict_with_another_s():
    """`with transaction(...)` runs its block once; what writes is handed to `run_transaction`."""
    once = set()
    for path in modules("app"):
        for block in (node for node in ast.walk(parsed(path)) if isinstance(node, ast.With)):
            if any(
                ast.unparse(item.context_expr).startswith("transaction(") for item in block.items
            ):
                calls = {
                    ast.unparse(node.func) for node in ast.walk(block) if isinstance(node, ast.Call)
                }
                once |= {(str(path.relative_to(REPO)), call) for call in calls & writers()}

    assert writers() >= {
        "jobs.cancel",
        "files.erase",
        "tenants.limit",
        "webhooks.delete",
        "api_keys.rotate",
    }
    assert once == set()


def test_every_module_says_what_it_is_for():
    paths = [path for room in ROOMS for path in modules(room)] + [
        REPO / f"{name}.py" for name in DOOR
    ]

    assert [
        str(path.relative_to(REPO)) for path in paths if not ast.get_docstring(parsed(path))
    ] == []


def dispatched() -> set[str]:
    """Task names that are published anywhere.

    What `announce` is handed, by their constants in `policy.queues`.
    """
    names = set()
    for room in ROOMS:
        for path in modules(room):
            for node in ast.walk(parsed(path)):
                if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
                    "broker.announce"
                ):
                    constant = ast.unparse(node.args[0])
                    assert constant.startswith("queues."), (
                        f"{path}: {constant} is not a name that can be followed"
                    )
                    names.add(getattr(queues, constant.removeprefix("queues.")))
    return names


def test_one_place_publishes():
    senders = {
        str(path.relative_to(REPO))
        for room in ROOMS
        for path in modules(room)
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Attribute) and node.attr in ("send_task", "apply_async", "delay")
    }

    assert senders == {"edges/broker.py"}


@pytest.mark.parametrize("tells", ["publish_ending", "publish_cancel"])
def test_whoever_ends_a_job_goes_through_one_place(tells):
    tellers = {
        str(path.relative_to(REPO))
        for room in ("app", "tasks", "dispatch")
        for path in modules(room)
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Attribute) and node.attr == tells
    }

    assert tellers == {"dispatch/endings.py"}


def test_every_dispatched_name_is_a_registered_task(stack):
    fleet = parse_fleet((REPO / "fleet.toml").read_text())
    celery = make_celery(BrokerSettings(broker_url=stack.env["BROKER_URL"]), fleet)
    names = dispatched()
    registered: set[str] = set()

    def all_are_registered() -> bool:
        # of those who answer in time
        answers = celery.control.inspect(timeout=0.3).registered() or {}
        registered.update(name.partition(" ")[0] for tasks in answers.values() for name in tasks)
        return names <= registered

    until(all_are_registered, within_s=60)


def test_every_name_that_is_announced_has_a_verb():
    assert dispatched() == set(VERBS)


LOADED = {
    "gateway": "import app.wsgi",
    "results": (
        "import tasks.roles.results as role, settings as s; role.consume = lambda *a, **k: 0;"
        " from policy.current import CurrentFleet;"
        " own = s.load(s.StoreSettings);"
        " role.serve(own, CurrentFleet(s.load_fleet_or_exit(own)))"
    ),
    "maintenance": "import tasks.serve, tasks.roles.maintenance",
    "webhooks": "import tasks.serve, tasks.roles.webhooks",
    "flower": "import tasks.serve, tasks.roles.flower",
    "command line": "import cli.main",
    "client": "import darkroom_client",
}


@pytest.fixture(scope="module")
def loaded() -> dict[str, set[str]]:
    """Top-level modules that each kind of process has loaded once it is ready to work.

    All start at once.
    """
    # A copy of the names: other threads may still import.
    tell = (
        "; import sys, json; print(json.dumps(sorted({name.partition('.')[0] for name in "
        "list(sys.modules)})))"
    )
    environment = {**ENOUGH, "PATH": os.environ.get("PATH", ""), "HOME": os.environ.get("HOME", "")}
    started = {
        role: subprocess.Popen(
            [sys.executable, "-c", code + tell],
            cwd=REPO,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for role, code in LOADED.items()
    }
    printed = {role: process.communicate(timeout=240)[0] for role, process in started.items()}
    return {role: set(json.loads(lines.splitlines()[-1])) for role, lines in printed.items()}


@pytest.mark.parametrize("role", LOADED)
def test_only_a_gpu_worker_loads_torch(loaded, role):
    assert not loaded[role] & {"torch", "diffusers", "transformers", "engine"}


def test_the_client_imports_nothing_of_the_house(loaded):
    assert loaded["client"] & HOUSE == {"darkroom_client"}


def test_the_gateway_does_not_load_the_tasks(loaded):
    assert "tasks" not in loaded["gateway"]


@functools.cache
def tracked() -> list[Path]:
    """Every file of the project, the new ones included."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [REPO / name for name in listed.stdout.split("\0") if name and (REPO / name).is_file()]


def test_no_file_knows_the_machine_it_was_written_on():
    homes = re.compile(rb"(?<![\w.$}])/(?:work|Users|root|home)/(?!darkroom\b)[A-Za-z]")
    found = []
    for path in tracked():
        content = path.read_bytes()
        if b"\0" not in content[:8192]:
            found += [
                f"{path.relative_to(REPO)}: {match.group().decode()}"
                for match in homes.finditer(content)
            ]

    assert found == []


def test_requirements_are_pinned_exactly():
    pinned = re.compile(r"[A-Za-z0-9_.-]+(\[[a-z,]+\])?==[0-9][\w.+!]*(\s*;.*)?")
    files = [REPO / "requirements.txt", *sorted((REPO / "requirements").glob("*.txt"))]

    loose = []
    for file in files:
        lines = [line.partition("#")[0].strip() for line in file.read_text().splitlines()]
        loose += [
            f"{file.name}: {line}"
            for line in lines
            if line and not line.startswith("-r ") and not pinned.fullmatch(line)
        ]

    assert loose == []
    assert len(files) >= 3
