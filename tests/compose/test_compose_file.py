"""docker-compose.yml and its images, as far as reading them tells: no Docker needed."""

import ipaddress
import re
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from deploy.make_env import made
from fleet import redis_users
from fleet.services import SAVED_AT_STOP
from settings import (
    DeploymentSettings,
    FleetSettings,
    FlowerSettings,
    GatewayProcessSettings,
    MigrationSettings,
    OperatorSettings,
    Settings,
    SettingsInvalid,
    StoreSettings,
    WebhookSettings,
    WorkerSettings,
    load,
    read,
)
from tests.compose.conftest import REPO, variables_of, with_defaults

SETTINGS_OF = {
    "check": (DeploymentSettings,),
    "cli": (OperatorSettings,),
    "migrate": (MigrationSettings,),
    "api": (GatewayProcessSettings,),
    "worker": (WorkerSettings,),
    "worker-second": (WorkerSettings,),
    "results": (StoreSettings,),
    "sweeper": (Settings,),
    "webhooks": (WebhookSettings,),
    "flower": (FlowerSettings,),
}
ONE_SHOTS = {"check", "migrate", "cli"}
SECRET = re.compile(r"PASSWORD|SECRET(?!S)|PEPPER|(?<!API_)KEY|TOKEN")
PROCESSES = {
    "api": "gateway",
    "worker": "worker",
    "worker-second": "worker",
    "results": "results",
    "sweeper": "sweeper",
    "webhooks": "webhooks",
}


def test_it_is_the_whole_system(services: dict[str, Any]):
    others = {"postgres", "redis-broker", "redis-handoff", "objectstore"}

    assert set(services) == set(SETTINGS_OF) | others


def test_every_service_says_how_to_tell_whether_it_is_well(services: dict[str, Any]):
    assert {name for name, service in services.items() if "healthcheck" not in service} == ONE_SHOTS
    assert all(services[name]["restart"] == "no" for name in ONE_SHOTS)
    assert all(
        service["restart"] == "unless-stopped"
        for name, service in services.items()
        if name not in ONE_SHOTS
    )


def test_health_checks_of_message_roles_ask_whether_their_loops_move(
    services: dict[str, Any],
):
    for name in ("results", "sweeper", "webhooks"):
        port = services[name]["environment"]["METRICS_PORT"]
        assert services[name]["healthcheck"]["test"][-2:] == [
            "deploy.health",
            f"http://127.0.0.1:{port}/metrics",
        ]
    assert services["worker"]["healthcheck"]["test"][-1] == "worker"
    assert services["worker"]["environment"]["METRICS_PORT"] != "0"


def test_every_service_that_runs_on_has_time_to_stop_and_a_limit_on_its_logs(
    services: dict[str, Any],
):
    assert all(
        "stop_grace_period" in service
        for name, service in services.items()
        if name not in ONE_SHOTS
    )
    assert all(
        {"max-size", "max-file"} <= set(service["logging"]["options"])
        for service in services.values()
    )


def test_every_service_has_limits_and_only_the_capabilities_that_it_needs(services: dict[str, Any]):
    for name, service in services.items():
        assert service["mem_limit"], name
        assert service["pids_limit"] >= 512, name
        assert service["cap_drop"] == ["ALL"], name
        assert set(service.get("cap_add", [])) <= {
            "CHOWN",
            "DAC_OVERRIDE",
            "FOWNER",
            "SETGID",
            "SETUID",
        }, name
        assert service["security_opt"] == ["no-new-privileges:true"], name
    assert not any("cap_add" in services[name] for name in SETTINGS_OF)
    # it may not signal another user's process
    assert not any(service.get("init") for service in services.values() if "cap_add" in service)


def test_only_who_has_to_reaches_other_machines(services: dict[str, Any], compose_text: str):
    networks = yaml.safe_load(compose_text)["networks"]
    closed = {name for name, network in networks.items() if network.get("internal")}

    open_to = {name for name, service in services.items() if set(service["networks"]) - closed}

    assert closed == {"backend", "storage"}
    assert open_to == {"api", "webhooks", "flower", "objectstore"}
    assert {name for name, service in services.items() if "ports" in service} <= open_to


def test_the_worker_is_told_to_leave_before_it_is_killed(services: dict[str, Any]):
    grace_s = float(services["worker"]["stop_grace_period"].removesuffix("s"))

    assert float(services["worker"]["environment"]["SHUTDOWN_NOTICE_S"]) + 10 <= grace_s


def test_settings_are_checked_before_anything_starts(services: dict[str, Any]):
    for name in ("postgres", "redis-broker", "redis-handoff", "objectstore"):
        assert services[name]["depends_on"]["check"] == {
            "condition": "service_completed_successfully"
        }
    assert services["check"]["command"] == ["darkroom", "check", "--offline", "deployment"]


def test_each_process_has_a_name_and_a_password_of_its_own(services: dict[str, Any]):
    for service, process in PROCESSES.items():
        environment = services[service]["environment"]
        users = {
            variable: urlsplit(environment[variable]).username
            for variable in ("DATABASE_URL", "BROKER_URL", "HANDOFF_URL")
        }
        passwords = {urlsplit(environment[variable]).password for variable in users}
        assert users == {
            "DATABASE_URL": f"darkroom_{process}",
            "BROKER_URL": process,
            "HANDOFF_URL": process,
        }
        assert passwords == {services["migrate"]["environment"][f"{process.upper()}_PASSWORD"]}


@pytest.mark.parametrize(
    ("service", "users"),
    [("redis-broker", redis_users.BROKER), ("redis-handoff", redis_users.HANDOFF)],
)
def test_the_users_of_redis_are_those_of_the_one_machine_stack(
    services: dict[str, Any], service: str, users: dict[str, str]
):
    variables = {name: f"$${name.upper()}_PASSWORD" for name in users} | {
        "flower": "$$FLOWER_BROKER_PASSWORD"
    }

    said = [
        line.strip()
        for line in services[service]["command"][-1].splitlines()
        if line.strip().startswith("user ")
    ]

    assert said == redis_users.lines(users, variables)
    told = services[service]["environment"]
    assert all(variable.strip("$") in told for name, variable in variables.items() if name in users)


def test_an_empty_secret_is_handed_on_as_it_is_and_refused(compose_text: str):
    assert not re.search(r"\$\{\w+:-development-only", compose_text)


def test_make_env_gives_every_secret_a_value_of_its_own():
    example = (REPO / "deploy/compose.env.example").read_text()

    values = dict(re.findall(r"^(\w+)=(.+)$", made(example), re.MULTILINE))

    assert values.keys() == {
        name
        for name, value in re.findall(r"^#(\w+)=(.*)$", example, re.MULTILINE)
        if "development-only" in value
    }
    assert len(set(values.values())) == len(values)
    assert all(re.fullmatch("[0-9a-f]{64}", value) for value in values.values())


@pytest.mark.parametrize("listen", ["GATEWAY_LISTEN", "OBJECT_STORE_LISTEN", "FLOWER_LISTEN"])
def test_default_secrets_are_refused_once_a_port_is_published(compose_text: str, listen: str):
    published = re.sub(rf"\$\{{{listen}[^}}]*\}}", "0.0.0.0:1", compose_text)
    environment = with_defaults(yaml.safe_load(published))["services"]["check"]["environment"]

    with pytest.raises(SettingsInvalid) as refused:
        read(DeploymentSettings, environment)

    named = {problem.partition(":")[0] for problem in refused.value.problems}
    assert {
        "API_KEY_PEPPER",
        "S3_SECRET_ACCESS_KEY",
        "WORKER_PASSWORD",
        "FLOWER_PASSWORD",
        "BROKER_PASSWORD",
    } <= named
    assert isinstance(
        read(DeploymentSettings, environment | {"ALLOW_DEVELOPMENT_SECRETS": "true"}),
        DeploymentSettings,
    )


def test_ports_are_bound_to_the_loopback_unless_told_otherwise(services: dict[str, Any]):
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}

    assert set(published) == {"api", "objectstore", "flower"}
    for ports in published.values():
        assert all(
            isinstance(port, str) and ipaddress.ip_address(port.split(":")[0]).is_loopback
            for port in ports
        )


def test_our_own_containers_are_not_root_and_have_nothing_to_write_to(services: dict[str, Any]):
    ours = {name: services[name] for name in SETTINGS_OF}

    for service in ours.values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["init"] is True
        assert not service.get("privileged")
    for dockerfile in {service["build"]["dockerfile"] for service in ours.values()}:
        assert (
            re.findall(r"^USER (.+)$", (REPO / dockerfile).read_text(), re.MULTILINE)[-1]
            == "10001:10001"
        )


def test_only_the_worker_image_has_torch(services: dict[str, Any]):
    def requirements(dockerfile: str) -> set[str]:
        return set(re.findall(r"-r (requirements/\w+\.txt)", (REPO / dockerfile).read_text()))

    images = {
        name: service["build"]["dockerfile"]
        for name, service in services.items()
        if "build" in service
    }
    with_torch = {
        name
        for name, dockerfile in images.items()
        if "requirements/engine.txt" in requirements(dockerfile)
    }

    assert set(images) == set(SETTINGS_OF)
    assert with_torch == {"worker", "worker-second"}
    assert requirements("deploy/api.Dockerfile") == {"requirements/base.txt"}
    assert not re.search(
        r"^(torch|diffusers|-r)\b", (REPO / "requirements/base.txt").read_text(), re.MULTILINE
    )


def test_everything_an_image_copies_is_let_through_by_dockerignore(services: dict[str, Any]):
    let_through = {
        line[1:]
        for line in (REPO / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    dockerfiles = {
        service["build"]["dockerfile"] for service in services.values() if "build" in service
    }

    for dockerfile in dockerfiles:
        for sources in re.findall(
            r"^COPY (.+) \S+$", (REPO / dockerfile).read_text(), re.MULTILINE
        ):
            for source in sources.split():
                assert any(
                    source == path or source.startswith(f"{path}/") for path in let_through
                ), (dockerfile, source)
                assert (REPO / source).exists() or source == "pocket/checkpoint"


def test_every_default_secret_says_that_it_is_for_development_only(compose_text: str):
    secrets = [variable for variable in variables_of(compose_text) if SECRET.search(variable.name)]

    assert len({variable.name for variable in secrets}) == 15
    for variable in secrets:
        assert variable.default.startswith("development-only"), variable.name


def test_no_secret_is_written_into_the_file_itself(compose_text: str):
    without_variables = re.sub(r"\$\{[^}]*\}", "", compose_text)

    for name, value in re.findall(r"^\s+(\w+): (.*)$", without_variables, re.MULTILINE):
        assert not SECRET.search(name) or value == "", name
    assert not re.search(r"//\w*:[^@/\s]+@", without_variables)


def test_a_variable_has_the_same_default_everywhere(compose_text: str):
    variables = set(variables_of(compose_text))

    assert len({variable.name for variable in variables}) == len(variables)


def test_every_variable_is_in_the_example_with_its_default(compose_text: str):
    example = dict(
        re.findall(
            r"^#(\w+)=(.*)$", (REPO / "deploy/compose.env.example").read_text(), re.MULTILINE
        )
    )

    observers = (REPO / "docker-compose.observability.yml").read_text()
    told = variables_of(compose_text) + variables_of(observers)
    defaults = {variable.name: variable.default for variable in told}
    assert example == defaults | {"GRAFANA_PASSWORD": ""}, "which has to be set where it is used"


@pytest.mark.parametrize("name", SETTINGS_OF)
def test_a_service_is_told_only_what_its_settings_know(services: dict[str, Any], name: str):
    known = {field.upper() for kind in SETTINGS_OF[name] for field in kind.model_fields}

    assert set(services[name]["environment"]) - known == set()


@pytest.mark.parametrize("name", SETTINGS_OF)
def test_a_service_is_told_everything_that_its_settings_ask_for(
    services: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
):
    for kind in SETTINGS_OF[name]:
        for field in kind.model_fields:
            monkeypatch.delenv(field.upper(), raising=False)
    for variable, value in services[name]["environment"].items():
        monkeypatch.setenv(variable, str(value))

    for kind in SETTINGS_OF[name]:
        loaded = load(kind)
        if isinstance(loaded, FleetSettings):
            loaded.load_fleet()


def test_a_worker_holds_no_key_of_the_object_store_and_only_the_gateway_has_the_pepper(
    services: dict[str, Any],
):
    told = {name: set(service["environment"]) for name, service in services.items()}

    assert {name for name, variables in told.items() if "S3_SECRET_ACCESS_KEY" in variables} == {
        "api",
        "results",
        "check",
    }
    assert {name for name, variables in told.items() if "API_KEY_PEPPER" in variables} == {
        "api",
        "check",
        "cli",
    }
    assert {name for name, variables in told.items() if "MIGRATION_DATABASE_URL" in variables} == {
        "migrate",
        "check",
    }
    assert {name for name, variables in told.items() if "DATABASE_URL" in variables} == {
        "check",
        "cli",
        "migrate",
        "api",
        "worker",
        "worker-second",
        "results",
        "webhooks",
        "sweeper",
    }
    assert "storage" not in services["worker"]["networks"] + services["flower"]["networks"]


def test_addresses_lead_to_services_of_the_file(services: dict[str, Any]):
    for name in SETTINGS_OF.keys() - {"check"}:  # that one connects to nothing
        for variable, value in services[name]["environment"].items():
            if variable.endswith("_URL") and variable not in (
                "S3_PUBLIC_ENDPOINT_URL",
                "PUBLIC_URL",
            ):
                host = urlsplit(value).hostname
                assert set(services[host]["networks"]) & set(services[name]["networks"]), (
                    name,
                    variable,
                )


def test_passwords_are_the_same_on_both_sides(services: dict[str, Any]):
    def password(url: str) -> str | None:
        return urlsplit(services["check"]["environment"][url]).password

    assert (
        password("MIGRATION_DATABASE_URL")
        == services["postgres"]["environment"]["POSTGRES_PASSWORD"]
    )
    assert password("BROKER_URL") == services["redis-broker"]["environment"]["REDISCLI_AUTH"]
    assert password("HANDOFF_URL") == services["redis-handoff"]["environment"]["REDISCLI_AUTH"]
    for ours, theirs in {
        "S3_ACCESS_KEY_ID": "AWS_ACCESS_KEY_ID",
        "S3_SECRET_ACCESS_KEY": "AWS_SECRET_ACCESS_KEY",
    }.items():
        assert (
            services["api"]["environment"][ours]
            == services["objectstore"]["environment"][theirs]
            != ""
        )
    assert (
        services["api"]["environment"]["S3_BUCKET"]
        == services["objectstore"]["environment"]["S3_BUCKET"]
    )


def test_the_gateway_s_temporary_folder_holds_several_uploads_and_is_part_of_its_memory(
    services: dict[str, Any],
):
    api = services["api"]
    [found] = [re.fullmatch(r"/tmp:size=(\d+)m,mode=1777", mount) for mount in api["tmpfs"]]
    memory = re.fullmatch(r"(\d+)m", str(api["mem_limit"]))

    assert found is not None
    assert memory is not None
    assert int(found[1]) * 2**20 * 4 // 5 >= 6 * int(api["environment"]["MAX_UPLOAD_BYTES"])
    assert int(memory[1]) >= 1024 + int(found[1])


def test_a_full_redis_refuses_rather_than_forgets(services: dict[str, Any]):
    def options(name: str) -> list[str]:
        return [line.strip() for line in services[name]["command"][-1].splitlines()]

    assert {"maxmemory 256mb", "maxmemory-policy noeviction", "appendonly yes"} <= set(
        options("redis-broker")
    )
    assert {"maxmemory 1gb", "maxmemory-policy noeviction", f"save {SAVED_AT_STOP}"} <= set(
        options("redis-handoff")
    )
    assert any(volume.endswith(":/data") for volume in services["redis-handoff"]["volumes"])


def test_roles_that_take_in_work_stop_before_those_that_finish_it(services: dict[str, Any]):
    for name in ("api", "worker", "worker-second"):
        assert {"results", "webhooks", "sweeper"} <= set(services[name]["depends_on"])
    for name in ("results", "webhooks", "sweeper"):
        assert {"postgres", "redis-broker", "redis-handoff"} <= set(services[name]["depends_on"])


def test_nobody_starts_before_the_tables_are_there(services: dict[str, Any]):
    after = {
        name for name, service in services.items() if "migrate" in service.get("depends_on", {})
    }

    assert after == {"api", "worker", "worker-second", "results", "webhooks", "sweeper"}
    assert all(
        services[name]["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}
        for name in after
    )


def test_the_gpu_file_changes_the_workers_alone_and_builds_torch_with_cuda(
    services: dict[str, Any], gpu_services: dict[str, Any]
):
    worker = gpu_services["worker"]
    (device,) = worker["deploy"]["resources"]["reservations"]["devices"]

    assert set(gpu_services) == {"worker", "worker-second"}
    assert gpu_services["worker-second"] == worker
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert worker["build"]["args"] == {
        "TORCH_INDEX_URL": "",
        "PIP_FIND_LINKS": "",
        "APT_PACKAGES": "gcc libc6-dev",
    }
    assert worker["image"] != services["worker"]["image"]


def test_second_pool_s_worker_is_the_first_s_but_for_its_pool_and_its_profile(
    services: dict[str, Any],
):
    first = dict(services["worker"])
    second = dict(services["worker-second"])

    assert second.pop("profiles") == ["second-pool"]
    pools = [service.pop("environment").pop("WORKER_POOL") for service in (first, second)]
    assert pools == ["local", ""], "nobody starts it without a pool"
    assert second == first


def test_workers_see_the_weights_and_the_curves_of_the_host(compose_text: str):
    mounts = yaml.safe_load(compose_text)["services"]["worker"]["volumes"]

    assert "${CHECKPOINTS:-checkpoints}:/checkpoints:ro" in mounts
    assert "${CURVES:-curves}:/var/lib/darkroom/curves" in mounts
    volumes = yaml.safe_load(compose_text)["volumes"]
    assert "${MODEL_CACHE:-weights}:/var/lib/darkroom/weights" in mounts
    assert "compiled:/var/lib/darkroom/compiled" in mounts
    assert {"checkpoints", "compiled", "curves", "weights"} <= set(volumes)


def test_workers_that_fetch_weights_may_leave_and_are_told_only_what_their_settings_know():
    added = yaml.safe_load((REPO / "docker-compose.weights.yml").read_text())["services"]
    known = {field.upper() for field in WorkerSettings.model_fields}

    assert set(added) == {"worker", "worker-second"}
    for worker in added.values():
        assert worker["networks"] == ["backend", "outside"]
        assert set(worker["environment"]) <= known
