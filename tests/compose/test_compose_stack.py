"""The compose stack for real: builds both images, starts everything, makes an image, restarts, and
leaves nothing behind.

Takes minutes and a Docker engine, so it runs only when asked for: `pytest -m compose`. Uses a
project, ports and image tags of its own.
"""

import contextlib
import copy
import hashlib
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tomlkit

from tests.compose.conftest import REPO

pytestmark = [pytest.mark.compose, pytest.mark.timeout(3600)]

JOB_BODY = {"prompt": "a red circle on a blue background", "tier": "quality", "seed": 7}


class Compose:
    """A project of its own, on free ports, from images of its own tag."""

    def __init__(self, command: list[str], folder: Path) -> None:
        """Put what an operator edits, and nothing else, into `folder`; images are built before."""
        self.fleet_file = folder / "fleet.toml"
        self._command = [*command, "-p", f"darkroomtest{os.getpid()}"]
        self._here = ["-f", str(folder / "docker-compose.yml")]
        for name in ("docker-compose.yml", "fleet.toml"):
            shutil.copy(REPO / name, folder / name)
            (folder / name).chmod(0o644)
        gateway, objects, flower = (_free_port() for _ in range(3))
        self.gateway = f"http://127.0.0.1:{gateway}"
        self.flower = f"http://127.0.0.1:{flower}"
        self.environment = os.environ | {
            "DARKROOM_TAG": "test",
            "GATEWAY_LISTEN": f"127.0.0.1:{gateway}",
            "OBJECT_STORE_LISTEN": f"127.0.0.1:{objects}",
            "S3_PUBLIC_ENDPOINT_URL": f"http://127.0.0.1:{objects}",
            "FLOWER_LISTEN": f"127.0.0.1:{flower}",
        }

    def build(self) -> None:
        done = self._run(["-f", str(REPO / "docker-compose.yml")], "build")
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    def run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return self._run(self._here, *arguments)

    def _run(self, files: list[str], *arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*self._command, *files, *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def __call__(self, *arguments: str) -> str:
        """Standard output; a command that fails is a failed test that shows its errors."""
        done = self.run(*arguments)
        assert done.returncode == 0, (
            f"{' '.join(arguments)}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        )
        return done.stdout

    def told(self, *arguments: str) -> str:
        """Both outputs of a command that ends well."""
        done = self.run(*arguments)
        assert done.returncode == 0, (
            f"{' '.join(arguments)}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        )
        return done.stdout + done.stderr

    def states(self) -> dict[str, dict[str, Any]]:
        """What Docker says of every container, by service."""
        inspected = self._inspect(*self("ps", "-a", "-q").split())
        return {
            found["Config"]["Labels"]["com.docker.compose.service"]: found["State"]
            for found in inspected
        }

    def wait_until_well(self, within_s: float = 300) -> None:
        """Until every container is healthy, or has ended well where it has no health."""
        deadline = time.monotonic() + within_s
        unwell: dict[str, str] = {}
        while time.monotonic() < deadline:
            unwell = {
                name: _health(state)
                for name, state in self.states().items()
                if _health(state) not in ("healthy", "ended well")
            }
            if not unwell:
                return
            time.sleep(2)
        raise AssertionError(f"not well: {unwell}\n" + self("logs", "--tail=30", *unwell))

    def networks(self, service: str) -> list[dict[str, Any]]:
        """What Docker says of every network that the service's container is on."""
        (found,) = self._inspect(*self("ps", "-q", service).split())
        return self._inspect(*found["NetworkSettings"]["Networks"])

    @staticmethod
    def _inspect(*names: str) -> list[dict[str, Any]]:
        shown = subprocess.run(
            ["docker", "inspect", *names], capture_output=True, text=True, check=True
        ).stdout
        inspected: list[dict[str, Any]] = json.loads(shown)
        return inspected

    def psql(self, statement: str) -> list[str]:
        return self(
            "exec",
            "-T",
            "postgres",
            "psql",
            "-U",
            "darkroom_owner",
            "-d",
            "darkroom",
            "-Atc",
            statement,
        ).splitlines()


@pytest.fixture(scope="module")
def compose(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Compose]:
    if "compose" not in request.config.getoption("markexpr"):
        pytest.skip("builds images and takes minutes; run it with `pytest -m compose`")
    command = _compose_command()
    if command is None:
        pytest.skip("no Docker engine answers, or there is no docker compose")
    if not (REPO / "pocket/checkpoint/model_index.json").exists():
        pytest.skip("pocket/checkpoint is not there; `make pocket` trains it")
    compose = Compose(command, tmp_path_factory.mktemp("compose"))
    try:
        compose.build()
        compose("up", "-d")
        compose.wait_until_well()
        yield compose
    finally:
        compose("down", "--volumes", "--timeout", "60")


@pytest.fixture(scope="module")
def client(compose: Compose) -> Iterator[httpx.Client]:
    """The gateway, with a key that was issued as an operator would."""
    compose("run", "--rm", "-T", "cli", "tenants", "create", "acme")
    key = compose("run", "--rm", "-T", "cli", "keys", "issue", "--tenant", "acme").strip()
    with httpx.Client(
        base_url=compose.gateway,
        headers={"Authorization": f"Bearer {key}"},
        timeout=90,
        trust_env=False,
    ) as client:
        yield client


def test_every_container_is_well_and_the_gateway_ready(compose: Compose, client: httpx.Client):
    assert all(_health(state) in ("healthy", "ended well") for state in compose.states().values())
    assert client.get("/readyz").json()["degraded"] == []


@pytest.mark.parametrize("service", ["api", "worker", "results", "webhooks", "sweeper", "flower"])
def test_our_processes_are_nobody_in_particular_and_write_nowhere(compose: Compose, service: str):
    shown = compose(
        "exec",
        "-T",
        service,
        "sh",
        "-c",
        "id -u; touch /app/x 2>/dev/null && echo writable; grep CapEff /proc/self/status",
    )

    assert shown.split() == ["10001", "CapEff:", "0000000000000000"]


def test_the_command_line_works_in_its_container(compose: Compose, client: httpx.Client):
    _finished(client, JOB_BODY)

    assert "nothing is wrong" in compose.told(
        "run", "--rm", "-T", "api", "darkroom", "check", "gateway"
    )
    assert "acme" in compose(
        "run", "--rm", "-T", "cli", "sql", "SELECT DISTINCT tenant FROM job_history"
    )
    assert compose("run", "--rm", "-T", "cli", "audit", "verify").startswith("intact: ")
    assert "tenants" in compose("run", "--rm", "-T", "cli", "--help")


@pytest.mark.parametrize("service", ["worker", "results", "sweeper", "postgres", "redis-handoff"])
def test_services_that_need_no_other_machine_can_reach_none(compose: Compose, service: str):
    # an engine forwards nothing from or to an internal one, whatever routes a container sees
    networks = compose.networks(service)

    assert networks
    assert all(network["Internal"] for network in networks), [
        network["Name"] for network in networks
    ]


def test_an_edited_fleet_file_with_an_error_ends_the_start(compose: Compose, tmp_path: Path):
    wrong = tmp_path / "fleet.toml"
    wrong.write_text((REPO / "fleet.toml").read_text().replace("rank = 0", "rank = -1"))
    wrong.chmod(0o644)
    mounted = ("-v", f"{wrong}:/wrong/fleet.toml:ro", "-e", "FLEET_FILE=/wrong/fleet.toml")

    for service in ("check", "migrate", "flower"):  # the others go by what is in force
        ended = compose.run("run", "--rm", "-T", "--no-deps", *mounted, service)
        assert ended.returncode, service
        assert "fleet.toml: tiers.fast.rank: " in ended.stdout + ended.stderr, service


def test_only_the_worker_can_load_torch(compose: Compose):
    for service in ("api", "results", "webhooks", "sweeper", "flower"):
        found = "import importlib.util as u; print(u.find_spec('torch'), u.find_spec('diffusers'))"
        assert compose("exec", "-T", service, "python", "-c", found).split() == ["None", "None"]


def test_a_prompt_becomes_an_image_at_a_presigned_url_and_a_row_in_the_audit_log(
    compose: Compose, client: httpx.Client
):
    job = _finished(client, JOB_BODY)

    shown = client.get(f"/v1/jobs/{job['id']}/images/0")
    image = httpx.get(shown.headers["Location"], trust_env=False)
    events = compose.psql(f"SELECT event FROM audit_log WHERE job_id = '{job['id']}' ORDER BY seq")

    assert shown.status_code == 302
    assert image.status_code == 200
    assert hashlib.sha256(image.content).hexdigest() == job["images"][0]["content_sha256"]
    assert {"job:request:accepted", "job:state:succeeded"} <= set(events)


def test_an_image_is_shown_to_nobody_without_a_signature(compose: Compose, client: httpx.Client):
    job = _finished(client, JOB_BODY)
    signed = client.get(f"/v1/jobs/{job['id']}/images/0").headers["Location"]

    # stores differ in what they call it
    assert httpx.get(signed.partition("?")[0], trust_env=False).status_code in (400, 403)


def test_flower_asks_for_a_password_and_lists_the_workers(compose: Compose):
    assert httpx.get(f"{compose.flower}/api/workers", trust_env=False).status_code == 401

    workers = httpx.get(
        f"{compose.flower}/api/workers",
        params={"refresh": 1},
        auth=("operator", "development-only-change-me"),
        trust_env=False,
        timeout=30,
    ).json()

    assert any(name.startswith(("local-cpu@", "local-gpu")) for name in workers)


def test_a_restart_keeps_everything_and_every_process_ends_in_good_order(
    compose: Compose, client: httpx.Client
):
    before = _finished(client, JOB_BODY)

    compose("stop")
    ended = {name: state["ExitCode"] for name, state in compose.states().items()}
    compose("up", "-d")
    compose.wait_until_well()

    # 143: ended by SIGTERM; 137 would be a kill
    assert {name: code for name, code in ended.items() if code not in (0, 143)} == {}
    assert ended["check"] == 0
    assert {ended[name] for name in ("api", "worker", "results", "webhooks", "sweeper")} == {0}
    assert client.get(f"/v1/jobs/{before['id']}").json()["state"] == "succeeded"
    image = httpx.get(
        client.get(f"/v1/jobs/{before['id']}/images/0").headers["Location"], trust_env=False
    )
    assert hashlib.sha256(image.content).hexdigest() == before["images"][0]["content_sha256"]
    assert (
        _finished(client, JOB_BODY)["images"][0]["pixels_sha256"]
        == before["images"][0]["pixels_sha256"]
    )


def test_an_own_checkpoint_is_served_by_a_second_pool(
    compose: Compose, client: httpx.Client, tmp_path: Path
):
    own = tmp_path / "checkpoints" / "My.Model"
    shutil.copytree(REPO / "pocket/checkpoint", own)
    subprocess.run(["chmod", "-R", "a+rX", tmp_path.parent, own.parent], check=True)
    compose.fleet_file.write_text(_with_a_second_pool(compose.fleet_file.read_text()))
    compose.environment |= {
        "CHECKPOINTS": str(own.parent),
        "COMPOSE_PROFILES": "second-pool",
        "SECOND_POOL": "second",
    }

    compose("up", "-d")
    compose.wait_until_well()
    first = _finished(client, JOB_BODY)
    second = _finished(client, JOB_BODY | {"model": "My.Model"})

    assert (first["model"], second["model"]) == ("pocket", "My.Model")
    assert second["images"][0]["pixels_sha256"] == first["images"][0]["pixels_sha256"]
    workers = compose("run", "--rm", "-T", "cli", "sql", "SELECT pool, models FROM workers_now")
    assert "My.Model" in workers


def _with_a_second_pool(text: str) -> str:
    """Add a copy of the model pocket as `My.Model`, from the mounted folder, in a second pool."""
    fleet = tomlkit.parse(text).unwrap()
    own = copy.deepcopy(fleet["models"]["pocket"])
    del own["aliases"]
    own["versions"][0]["source"] = "/checkpoints/My.Model"
    fleet["models"]["My.Model"] = own
    fleet["pools"]["second"] = fleet["pools"]["local"] | {"models": ["My.Model"]}
    return tomlkit.dumps(fleet)


def _finished(client: httpx.Client, job_body: dict[str, Any]) -> dict[str, Any]:
    answer = client.post("/v1/jobs", json=job_body, headers={"Prefer": "wait=60"})
    job: dict[str, Any] = answer.json()
    assert job.get("state") == "succeeded", job
    return job


def _health(state: dict[str, Any]) -> str:
    if "Health" in state and state["Status"] == "running":
        return str(state["Health"]["Status"])
    return (
        "ended well"
        if state["Status"] == "exited" and state["ExitCode"] == 0 and "Health" not in state
        else str(state["Status"])
    )


def _compose_command() -> list[str] | None:
    """`docker compose`, or docker-compose, with an engine behind it."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]) and all(
            _works(*arguments) for arguments in (["docker", "info"], [*command, "version"])
        ):
            return command
    return None


def _works(*command: str) -> bool:
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
