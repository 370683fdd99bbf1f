"""The one-machine stack: what it keeps, what it restarts, what it leaves behind."""

import itertools
import os
import re
import shutil
import signal
import socket
import stat
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import boto3
import httpx
import psutil
import psycopg2
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from cli.sql import ask
from fleet import processes
from fleet.addresses import (
    LISTENERS,
    Addresses,
    as_handed_to,
    free_ports,
    is_free,
    read_env,
    write_env,
)
from fleet.stack import Stack, StackError, _missing_workers, _unready_parts
from fleet.supervision import MARK
from migrations import roles
from policy.workers import WorkerNow
from settings import REPO

SERVICES = {"postgres", "broker", "handoff", "s3"}


@pytest.fixture(scope="module")
def services():
    """The four services of a stack of their own, without the house.

    The folder is too deep for a unix socket.
    """
    folder = Path(tempfile.mkdtemp(prefix="darkroom-tests-"))
    stack = Stack(folder / ("deep" * 20) / "data")
    up_services(stack)
    yield stack
    stack.down()
    shutil.rmtree(folder, ignore_errors=True)


def up_services(stack):
    with stack._lock():
        return stack._up_services(time.monotonic() + 60)


def broker_of(stack):
    return redis.Redis.from_url(stack.env["BROKER_URL"], socket_timeout=2)


def store_of(stack, **changes):
    env = stack.env
    keys = {
        "aws_access_key_id": env["S3_ACCESS_KEY_ID"],
        "aws_secret_access_key": env["S3_SECRET_ACCESS_KEY"],
    } | changes
    return boto3.client("s3", endpoint_url=env["S3_ENDPOINT_URL"], region_name="us-east-1", **keys)


def marked(stack):
    """Processes that bear the stack's mark."""
    found = []
    for process in psutil.process_iter():
        try:
            if (
                process.environ().get(MARK) == str(stack.data_dir)
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def until(is_so, within_s=60):
    deadline = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < deadline, "it never became so"
        time.sleep(0.1)


def state_of(stack, name):
    return next(status.state for status in stack.status() if status.name == name)


def test_addresses_survive_being_written_and_read_back(tmp_path):
    first = Addresses.fresh()
    write_env(tmp_path / "env", {**first.env(), "LOG_LEVEL": "DEBUG"})

    again = Addresses.from_env(read_env(tmp_path / "env"))

    assert again.ports == first.ports
    assert again.env() == {**first.env(), "LOG_LEVEL": "DEBUG"}


def test_a_port_that_somebody_took_is_chosen_anew_and_the_others_stay():
    addresses = Addresses.fresh()
    with socket.socket() as intruder:
        intruder.bind(("127.0.0.1", addresses.ports["s3"]))
        intruder.listen()

        moved = addresses.with_free_ports(LISTENERS)

    assert moved.ports["s3"] != addresses.ports["s3"]
    assert {**moved.ports, "s3": 0} == {**addresses.ports, "s3": 0}


def test_free_ports_are_different_and_free():
    ports = free_ports(20)

    assert len(set(ports)) == 20
    assert all(is_free(port) for port in ports)


def test_each_process_is_handed_only_what_its_settings_name(tmp_path):
    env = Addresses.fresh().env() | {"DARKROOM_API_KEY": "dr_key"}
    programs = {
        program.name: program.environment
        for program in processes.programs(env, Stack(tmp_path)._fleet(), workers={"local": 2})
    }

    assert (
        not {"S3_SECRET_ACCESS_KEY", "API_KEY_PEPPER", "FLOWER_PASSWORD"}
        & programs["worker-1"].keys()
    )
    assert "API_KEY_PEPPER" not in programs["results"]
    assert not {"DATABASE_URL", "HANDOFF_URL", "S3_SECRET_ACCESS_KEY"} & programs["flower"].keys()
    assert "FLOWER_PASSWORD" in programs["flower"]
    assert programs["worker-1"]["WORKER_NAME"] != programs["worker-2"]["WORKER_NAME"]
    users = {
        name: urlsplit(environment["BROKER_URL"]).username for name, environment in programs.items()
    }
    assert users == {name: name.partition("-")[0] for name in programs}
    passwords = {
        name: urlsplit(environment["BROKER_URL"]).password for name, environment in programs.items()
    }
    # Flower's own password is for the people who log in to it.
    assert passwords == {name: env[f"{users[name].upper()}_PASSWORD"] for name in programs} | {
        "flower": env["FLOWER_BROKER_PASSWORD"]
    }
    assert {urlsplit(programs[name].get("DATABASE_URL", "")).username for name in programs} == {
        *roles.OF_PROCESS.values(),
        None,
    }
    assert {urlsplit(programs[name].get("HANDOFF_URL", "")).username for name in programs} == {
        *roles.OF_PROCESS,
        None,
    }
    for environment in programs.values():
        assert (
            not {"MIGRATION_DATABASE_URL", "AUDITOR_DATABASE_URL", "DARKROOM_API_KEY"}
            & environment.keys()
        )


def test_a_stack_of_an_older_version_gets_the_passwords_that_it_lacks():
    older = {
        name: value
        for name, value in Addresses.fresh().env().items()
        if name not in ("WORKER_PASSWORD", "FLOWER_BROKER_PASSWORD")
    }

    env = Addresses.from_env(older).env()

    assert len(env["WORKER_PASSWORD"]) == len(env["FLOWER_BROKER_PASSWORD"]) == 32
    assert {name: env[name] for name in older} == older


def test_a_wrong_setting_is_told_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setenv("LEASE_STOP_S", "20")
    stack = Stack(tmp_path / "data")

    with pytest.raises(
        StackError, match=r"^settings: LEASE_STOP_S: must be .* less than LEASE_TTL_S[^\n]*$"
    ):
        stack.up()

    assert stack.status() == []


def test_stack_s_own_variables_win_over_the_caller_s_whose_tuning_is_taken_over(
    tmp_path, monkeypatch
):
    """A shell may hold the address of another Postgres."""
    monkeypatch.setenv("DATABASE_URL", "postgresql://elsewhere/production")
    monkeypatch.setenv("S3_BUCKET", "production")
    monkeypatch.setenv("LOG_LEVEL", "WARNING")
    monkeypatch.setenv("SWEEP_EVERY_S", "7")
    addresses = Addresses.fresh()
    env = addresses.env() | {"LOG_LEVEL": "DEBUG"}  # a line that an operator added

    programs = {
        program.name: program.environment
        for program in processes.programs(env, Stack(tmp_path)._fleet(), workers={"local": 1})
    }

    assert {
        urlsplit(programs[name]["DATABASE_URL"]).port
        for name in roles.OF_PROCESS
        if name != "worker"
    } == {addresses.ports["postgres"]}
    assert programs["results"]["S3_BUCKET"] == env["S3_BUCKET"]
    assert {environment["LOG_LEVEL"] for environment in programs.values()} == {"DEBUG"}
    assert programs["sweeper"]["SWEEP_EVERY_S"] == "7"


def test_processes_have_ports_for_metrics_of_their_own_with_room_for_the_gpus_of_a_worker(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("METRICS_PORT", "9400")

    programs = processes.programs(
        Addresses.fresh().env(), Stack(tmp_path)._fleet(), workers={"local": 2}
    )

    ports = [
        int(program.environment["METRICS_PORT"])
        for program in programs
        if "METRICS_PORT" in program.environment
    ]
    assert ports[0] == 9400
    assert all(
        later - earlier >= processes.METRICS_STRIDE for earlier, later in itertools.pairwise(ports)
    )


class StoppedInWaves:
    """A supervisor that only notes what it is told to stop."""

    def __init__(self, names):
        self.told, self._names = [], names

    def status(self):
        return [SimpleNamespace(name=name) for name in self._names]

    def stop(self, names):
        self.told.append(set(names))

    def shut_down(self):
        self.told.append("supervisord")


def test_a_stack_goes_down_from_those_who_take_in_work_to_the_services_that_all_need(tmp_path):
    stack = Stack(tmp_path / "data")
    env = Addresses.fresh().env()
    programs = processes.programs(env, stack._fleet(), workers={"local": 2})
    (tmp_path / "data").mkdir()
    stack._supervisor = StoppedInWaves([*SERVICES, *(program.name for program in programs)])

    stack.down()

    finishing = {"results", "webhooks", "sweeper"}
    assert stack._supervisor.told == [
        {"gateway", "worker-1", "worker-2", "flower"},
        finishing,
        SERVICES,
        "supervisord",
    ]
    # what supervisord keeps to when it is told to end by itself
    order = {program.name: program.priority for program in programs}
    assert min(order[name] for name in order.keys() - finishing) > max(
        order[name] for name in finishing
    )


PARTS = {"database": {"ready": True}, "workers": {"ready": True, "pools": {"local": 2}}}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"workers": {"ready": True, "pools": {"local": 1}}},
            "not ready: workers of pool local (1 of 2)",
        ),
        (
            {"workers": {"ready": False, "live": 0, "detail": "no worker"}},
            "not ready: workers (no worker)",
        ),
        ({"store": {"ready": False}}, "not ready: store (not ready)"),
    ],
)
def test_a_stack_is_ready_when_its_parts_are_and_each_worker_that_was_asked_for_lives(
    tmp_path, monkeypatch, changes, told
):
    answers = iter([PARTS | changes, PARTS])
    write_env(tmp_path / "env", Addresses.fresh().env())
    transport = httpx.MockTransport(
        lambda request: httpx.Response(200, json={"parts": next(answers)})
    )
    client = httpx.Client
    monkeypatch.setattr(
        "fleet.stack.httpx.Client", lambda **options: client(**options, transport=transport)
    )
    stack = Stack(tmp_path, workers=2)
    ready = [WorkerNow(f"local-{n}@here", "local", "ready", is_silent=False) for n in (1, 2)]
    monkeypatch.setattr(stack, "_known_workers", lambda: ready)

    with pytest.raises(StackError, match=re.escape(f"the stack is not ready in time: {told}")):
        stack._wait_ready(time.monotonic() - 1, {"local": 2}, 1)

    stack._wait_ready(time.monotonic() - 1, {"local": 2}, 1)


@pytest.mark.parametrize(("state", "after_looks"), [("fatal", 1), ("backoff", 3)])
def test_a_process_that_keeps_dying_is_told_with_its_log_before_the_time_is_over(
    tmp_path, state, after_looks
):
    looks = []

    def status():
        looks.append(1)
        return [
            SimpleNamespace(name="gateway", state=state, started_at=len(looks)),
            SimpleNamespace(name="s3", state="running", started_at=0),
        ]

    stack = Stack(tmp_path / "data")
    stack._supervisor.status = status
    stack.log_path("gateway").parent.mkdir(parents=True)
    stack.log_path("gateway").write_text("Address already in use")

    def never():
        raise ConnectionError("no answer")

    with pytest.raises(
        StackError, match=re.escape("gateway keeps dying\n  gateway | Address already in use")
    ):
        stack._wait_until(never, None, time.monotonic() + 60, every_s=0)

    assert len(looks) == after_looks


def test_a_process_that_is_seen_to_start_again_and_again_is_told_as_well(tmp_path):
    """A worker dies after its imports, so supervisord takes it for one that ran."""
    looks = itertools.count(1)
    stack = Stack(tmp_path / "data")
    stack._supervisor.status = lambda: [
        SimpleNamespace(name="worker-1", state="running", started_at=next(looks) // 2)
    ]

    def never():
        raise ConnectionError("no answer")

    with pytest.raises(StackError, match="worker-1 keeps dying"):
        stack._wait_until(never, None, time.monotonic() + 60, every_s=0)

    assert next(looks) == 7, "at its third death"


def test_a_worker_that_refuses_to_start_is_told_at_once_with_its_last_words(tmp_path):
    stack = Stack(tmp_path / "data")
    ended = SimpleNamespace(name="worker-1", state="exited", exit_status=78, started_at=1)
    stack._supervisor.status = lambda: [ended]
    stack.log_path("worker").parent.mkdir(parents=True)
    stack.log_path("worker").write_text('{"event": "loading"}\nmodel a cannot be loaded\n')

    def never():
        raise ConnectionError("no answer")

    with pytest.raises(StackError) as raised:
        stack._wait_until(never, None, time.monotonic() + 60, every_s=0)

    told = "worker-1 cannot start\n  worker-1 | model a cannot be loaded"
    assert str(raised.value) == told


def a_fleet_with_a_second_pool(path: Path) -> Path:
    """Its model is the first one's, under another name."""
    first = (REPO / "fleet.toml").read_text()
    model, pool = first[first.index("[models.pocket]") :].split("[pools.local]")
    model = re.sub(r"(?s)aliases = \[.*?\]\n", "", model).replace("models.pocket", "models.other")
    second = f"{model}[pools.edit]{pool}".replace('models = ["pocket"]', 'models = ["other"]')
    file = path / "two-pools.toml"
    file.write_text(f"{first}\n{second}")
    return file


def test_a_stack_starts_workers_for_every_pool_each_under_a_name_of_its_own(tmp_path):
    file = a_fleet_with_a_second_pool(tmp_path)
    stack = Stack(tmp_path / "data", fleet_file=file, workers="edit=2")
    fleet = stack._fleet()

    programs = processes.programs(
        Addresses.fresh().env(), fleet, workers=stack._worker_counts(fleet)
    )

    named = {
        program.name: (program.environment["WORKER_POOL"], program.environment["WORKER_NAME"])
        for program in programs
        if program.name.startswith("worker")
    }
    host = socket.gethostname()
    assert named == {
        "worker-local-1": ("local", f"local-1@{host}"),
        "worker-edit-1": ("edit", f"edit-1@{host}"),
        "worker-edit-2": ("edit", f"edit-2@{host}"),
    }


def test_stack_starts_workers_of_the_capacity_classes_that_are_named(tmp_path):
    file = tmp_path / "classes.toml"
    classes = "[pools.local.classes.spot]\nslots = 20\n[pools.local.classes.mine]\n"
    file.write_text(f"{(REPO / 'fleet.toml').read_text()}\n{classes}")
    stack = Stack(tmp_path / "data", fleet_file=file, workers="local.spot=2,local.mine=1")
    fleet = stack._fleet()

    programs = processes.programs(
        Addresses.fresh().env(), fleet, workers=stack._worker_counts(fleet)
    )

    named = {
        program.name: [program.environment[name] for name in ("WORKER_CLASS", "WORKER_NAME")]
        for program in programs
        if program.name.startswith("worker")
    }
    host = socket.gethostname()
    assert named == {
        "worker-local.spot-1": ["spot", f"local.spot-1@{host}"],
        "worker-local.spot-2": ["spot", f"local.spot-2@{host}"],
        "worker-local.mine-1": ["mine", f"local.mine-1@{host}"],
    }


@pytest.mark.parametrize("place", ["the caller's environment", "the stack's file"])
def test_a_stack_serves_one_pool_alone_where_worker_pool_names_it(tmp_path, monkeypatch, place):
    file = a_fleet_with_a_second_pool(tmp_path)
    if place == "the caller's environment":
        monkeypatch.setenv("WORKER_POOL", "edit")
    else:
        write_env(tmp_path / "env", Addresses.fresh().env() | {"WORKER_POOL": "edit"})
    stack = Stack(tmp_path, fleet_file=file, workers=2)

    assert stack._worker_counts(stack._fleet()) == {"edit": 2}


def test_a_stack_remembers_its_fleet_file_and_where_its_weights_are(tmp_path, monkeypatch):
    file = a_fleet_with_a_second_pool(tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    monkeypatch.setenv("CHECKPOINT_ROOT", str(tmp_path))
    first = Stack(data, fleet_file=file)
    first._addresses(keep=set())
    monkeypatch.delenv("CHECKPOINT_ROOT")

    later = Stack(data)
    env = later._process_env(later._addresses(keep=set()))

    assert later.fleet_file == file
    assert (env["FLEET_FILE"], env["CHECKPOINT_ROOT"]) == (str(file), str(tmp_path))
    other = tmp_path / "other.toml"
    assert Stack(data, fleet_file=other).fleet_file == other, "what the caller says wins"


def test_flower_alone_is_another_process_once_the_fleet_file_was_edited(tmp_path):
    file = a_fleet_with_a_second_pool(tmp_path)
    stack = Stack(tmp_path / "data", fleet_file=file)

    addresses = Addresses.fresh()

    def environments() -> dict[str, object]:
        env = stack._process_env(addresses)
        programs = processes.programs(env, stack._fleet(), workers={"edit": 1})
        return {each.name: each.environment for each in programs}

    before = environments()
    file.write_text(file.read_text() + "\n# edited\n")
    after = environments()

    assert {name for name in before if before[name] != after[name]} == {"flower"}


def test_a_stack_does_not_wait_for_models_that_its_workers_cannot_load():
    part = {"ready": False, "detail": "cannot be loaded: a@1"}

    counts = {"local": 1}
    assert _unready_parts({"workers": part | {"pools": counts}}, counts) == []
    told = ["workers of pool local (0 of 1)"]
    assert _unready_parts({"workers": part | {"pools": {}}}, counts) == told


def test_a_worker_gets_the_time_that_it_was_promised(tmp_path, monkeypatch):
    monkeypatch.setenv("SHUTDOWN_NOTICE_S", "100")
    programs = processes.programs(
        Addresses.fresh().env(), Stack(tmp_path)._fleet(), workers={"local": 1}
    )

    assert {program.name: program.stop_wait_s for program in programs}["worker-1"] == 125


def test_an_unusable_fleet_file_is_told_by_its_key(tmp_path):
    (tmp_path / "fleet.toml").write_text("[tiers.fast]\nrank = -1\n")

    with pytest.raises(StackError, match=r"fleet.toml: tiers.fast.rank"):
        Stack(tmp_path / "data", fleet_file=tmp_path / "fleet.toml").up()


def test_a_stack_that_never_ran_has_no_env_no_processes_and_goes_down(tmp_path):
    stack = Stack(tmp_path / "data")

    stack.down()

    assert (stack.env, stack.status(), stack.is_up()) == ({}, [], False)
    with pytest.raises(StackError, match="not running"):
        stack.pid("gateway")


def test_services_answer_and_the_house_is_known_but_not_started(services):
    states = {status.name: status.state for status in services.status()}

    assert states.keys() > SERVICES
    assert {name for name, state in states.items() if state in ("starting", "running")} == SERVICES
    assert ask(
        services.env["MIGRATION_DATABASE_URL"],
        "SELECT current_setting('server_version_num')::int / 10000",
    ).rows == [(16,)]
    for url in (services.env["BROKER_URL"], services.env["HANDOFF_URL"]):
        assert (
            redis.Redis.from_url(url).config_get("maxmemory*")["maxmemory-policy"] == "noeviction"
        )
        assert int(redis.Redis.from_url(url).config_get("maxmemory")["maxmemory"]) > 0
    assert broker_of(services).config_get("appendonly") == {"appendonly": "yes"}


def test_everything_listens_on_the_loopback_and_asks_for_a_password(services):
    addresses = {
        connection.laddr.ip
        for process in marked(services)
        for connection in process.net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN
    }

    assert addresses == {"127.0.0.1"}
    with pytest.raises(redis.AuthenticationError):
        # by itself it would try again for seconds
        redis.Redis(
            port=int(services.env["BROKER_URL"].rpartition(":")[2].removesuffix("/0")),
            retry=Retry(NoBackoff(), 0),
        ).ping()
    with pytest.raises(psycopg2.OperationalError, match="password"):
        psycopg2.connect(
            re.sub(
                r":\w+@", ":wrong@", services.env["MIGRATION_DATABASE_URL"].replace("+psycopg2", "")
            )
        )
    with pytest.raises(store_of(services).exceptions.ClientError):
        store_of(services, aws_secret_access_key="wrong").list_objects_v2(
            Bucket=services.env["S3_BUCKET"]
        )


def test_secrets_are_for_their_owner_only_and_on_no_command_line(services):
    for name in ("env", "supervisord.conf", "broker.conf", "handoff.conf"):
        assert stat.S_IMODE((services.data_dir / name).stat().st_mode) == 0o600
    command_lines = " ".join(" ".join(process.cmdline()) for process in marked(services))
    secrets = [
        value
        for name, value in services.env.items()
        if name.endswith(("SECRET_ACCESS_KEY", "PASSWORD", "PEPPER"))
    ]
    assert len(secrets) == 9
    assert not [secret for secret in secrets if secret in command_lines]


REFUSED = {
    ("gateway", "BROKER_URL"): [
        "FLUSHALL",
        "CONFIG GET requirepass",
        "ACL LIST",
        "SHUTDOWN NOSAVE",
        "KEYS *",
    ],
    ("gateway", "HANDOFF_URL"): ["FLUSHALL", "GET anything", "SET anything 1"],
    ("worker", "HANDOFF_URL"): [
        "FLUSHDB",
        "GET budget:x",
        "SET LIMITS:x 1",
        "CLIENT KILL TYPE normal",
    ],
    ("results", "HANDOFF_URL"): ["GET budget:x", "GET watch:x", "DEBUG SLEEP 0"],
    ("webhooks", "HANDOFF_URL"): ["GET snapshot:x", "PUBLISH darkroom:cancels x", "SET events:x 1"],
    ("flower", "BROKER_URL"): ["LPUSH local.fast x", "FLUSHALL", "SET x 1"],
}


@pytest.mark.parametrize(("process", "server"), REFUSED)
def test_a_process_can_do_in_redis_what_it_has_to_and_no_more(services, process, server):
    env = as_handed_to(process, services.env)

    with redis.Redis.from_url(env[server]) as client:
        assert client.ping()
        for command in REFUSED[process, server]:
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*command.split())


def test_the_hand_off_keeps_its_content_over_a_stop(services):
    handoff = redis.Redis.from_url(services.env["HANDOFF_URL"])
    handoff.set("snapshot:kept", b"latents", ex=600)

    services.stop("handoff")
    services.start("handoff")

    until(lambda: state_of(services, "handoff") == "running")
    assert handoff.get("snapshot:kept") == b"latents"


def test_a_service_that_is_killed_comes_back_with_its_data(services):
    broker_of(services).set("kept", "yes")
    # appendfsync everysec, and supervisord's own second before it believes in a process
    time.sleep(1.2)
    before = services.pid("broker")

    services.kill("broker")

    until(lambda: services.pid("broker") not in (None, before))
    until(lambda: state_of(services, "broker") == "running")
    assert broker_of(services).get("kept") == b"yes"


def test_a_stopped_service_stays_stopped_until_it_is_started(services):
    services.stop("s3")

    assert services.pid("s3") is None
    assert state_of(services, "s3") == "stopped"

    services.start("s3")
    until(lambda: not is_free(int(services.env["S3_ENDPOINT_URL"].rpartition(":")[2])))


def test_a_restart_keeps_ports_secrets_and_data(services):
    store_of(services).put_object(
        Bucket=services.env["S3_BUCKET"], Key="t/kept.png", Body=b"pixels"
    )
    ask(services.env["MIGRATION_DATABASE_URL"], "CREATE TABLE kept AS SELECT 7 AS number")
    env = services.env

    services.down()
    assert marked(services) == []
    # the folder below the temporary directory
    assert not services._supervisor._socket.parent.exists()
    up_services(services)

    assert services.env == env
    assert ask(services.env["MIGRATION_DATABASE_URL"], "SELECT number FROM kept").rows == [(7,)]
    assert (
        store_of(services).get_object(Bucket=env["S3_BUCKET"], Key="t/kept.png")["Body"].read()
        == b"pixels"
    )


def test_orphans_of_a_killed_supervisor_are_ended_before_the_next_start(services):
    orphans = {status.name: status.pid for status in services.status() if status.pid}
    supervisord = next(
        process for process in marked(services) if "supervisor.supervisord" in process.cmdline()
    )
    ports = services.env["DATABASE_URL"]

    supervisord.kill()
    supervisord.wait()
    up_services(services)

    assert services.env["DATABASE_URL"] == ports
    alive = {
        process.pid for process in psutil.process_iter() if process.status() != psutil.STATUS_ZOMBIE
    }
    assert orphans.keys() == SERVICES
    assert not alive & set(orphans.values())


def test_a_second_command_does_not_start_the_same_stack_at_the_same_time(services):
    with services._lock(), pytest.raises(StackError, match="another command"):
        Stack(services.data_dir).up()


@pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user runs Postgres as itself")
def test_root_runs_postgres_under_an_account_without_rights(services):
    assert psutil.Process(services.pid("postgres")).username() != "root"


def test_a_gateway_that_is_killed_comes_back(stack, client):
    before = stack.pid("gateway")

    stack.kill("gateway", signal.SIGKILL)

    until(lambda: stack.pid("gateway") not in (None, before) and serves(stack.pid("gateway")))
    assert client.tiers()


def test_a_second_up_leaves_what_runs_alone(stack):
    before = {status.name: status.pid for status in stack.status()}
    env = stack.env

    stack.up()

    assert {status.name: status.pid for status in stack.status()} == before
    assert stack.env == env


def serves(gunicorn_pid):
    """Whether this gunicorn has a worker.

    It could bind its port, which an orphaned worker holds for another second.
    """
    try:
        return bool(psutil.Process(gunicorn_pid).children())
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    ("state", "revision", "told"),
    [
        ("ready", 3, []),
        ("ready", None, []),
        ("loading", 3, ["workers of pool local (0 of 1)"]),
        ("leaving", 3, ["workers of pool local (0 of 1)"]),
        ("ready", 2, ["local-1@here (goes by revision 2 of the fleet, not by 3)"]),
    ],
)
def test_up_waits_for_workers_that_take_jobs_by_the_new_revision(state, revision, told):
    worker = WorkerNow("local-1@here", "local", state, is_silent=False, revision=revision)

    assert _missing_workers([worker], {"local": 1}, 3) == told
