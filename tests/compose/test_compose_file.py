"""docker-compose.yml and its images, as far as reading them tells: no Docker needed."""

import ipaddress
import re
from typing import Any
from urllib.parse import urlsplit

import pytest

from migrations.__main__ import MigrationSettings
from settings import (
    BrokerSettings,
    CourierSettings,
    FlowerSettings,
    GatewaySettings,
    ServerSettings,
    Settings,
    StoreSettings,
    WorkerSettings,
    load,
)
from tests.compose.conftest import REPO, variables_of

SETTINGS_OF = {
    "migrate": (MigrationSettings,),
    "api": (GatewaySettings, ServerSettings),
    "worker": (WorkerSettings,),
    "results": (StoreSettings,),
    "sweeper": (Settings,),
    "webhooks": (CourierSettings,),
    "flower": (FlowerSettings,),
}
ONE_SHOTS = {"migrate"}
SECRET = re.compile(r"PASSWORD|SECRET|PEPPER|KEY|TOKEN")


def test_it_is_the_whole_system(services: dict[str, Any]):
    others = {"postgres", "redis-broker", "redis-handoff", "objectstore"}

    assert set(services) == set(SETTINGS_OF) | others


def test_every_service_says_how_to_tell_whether_it_is_well(services: dict[str, Any]):
    assert {name for name, service in services.items() if "healthcheck" not in service} == ONE_SHOTS
    assert all(services[name]["restart"] == "no" for name in ONE_SHOTS)
    assert all(service["restart"] == "unless-stopped" for name, service in services.items() if name not in ONE_SHOTS)


def test_every_service_that_runs_on_has_time_to_stop_and_a_limit_on_its_logs(services: dict[str, Any]):
    assert all("stop_grace_period" in service for name, service in services.items() if name not in ONE_SHOTS)
    assert all({"max-size", "max-file"} <= set(service["logging"]["options"]) for service in services.values())


def test_ports_are_bound_to_the_loopback_unless_told_otherwise(services: dict[str, Any]):
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}

    assert set(published) == {"api", "objectstore", "flower"}
    for ports in published.values():
        assert all(isinstance(port, str) and ipaddress.ip_address(port.split(":")[0]).is_loopback for port in ports)


def test_our_own_containers_are_not_root_and_have_nothing_to_write_to(services: dict[str, Any]):
    ours = {name: services[name] for name in SETTINGS_OF}

    for service in ours.values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["init"] is True
        assert not service.get("privileged")
    for dockerfile in {service["build"]["dockerfile"] for service in ours.values()}:
        assert re.findall(r"^USER (.+)$", (REPO / dockerfile).read_text(), re.MULTILINE)[-1] == "10001:10001"


def test_only_the_worker_image_has_torch(services: dict[str, Any]):
    def requirements(dockerfile: str) -> set[str]:
        return set(re.findall(r"-r (requirements/\w+\.txt)", (REPO / dockerfile).read_text()))

    images = {name: service["build"]["dockerfile"] for name, service in services.items() if "build" in service}
    with_torch = {name for name, dockerfile in images.items() if "requirements/engine.txt" in requirements(dockerfile)}

    assert set(images) == set(SETTINGS_OF)
    assert with_torch == {"worker"}
    assert requirements("deploy/api.Dockerfile") == {"requirements/base.txt"}
    assert not re.search(r"^(torch|diffusers|-r)\b", (REPO / "requirements/base.txt").read_text(), re.MULTILINE)


def test_everything_an_image_copies_is_let_through_by_dockerignore(services: dict[str, Any]):
    let_through = {line[1:] for line in (REPO / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    dockerfiles = {service["build"]["dockerfile"] for service in services.values() if "build" in service}

    for dockerfile in dockerfiles:
        for sources in re.findall(r"^COPY (.+) \S+$", (REPO / dockerfile).read_text(), re.MULTILINE):
            for source in sources.split():
                assert any(source == path or source.startswith(f"{path}/") for path in let_through), (dockerfile, source)
                assert (REPO / source).exists() or source == "pocket/checkpoint"


def test_every_default_secret_says_that_it_is_for_development_only(compose_text: str):
    secrets = [variable for variable in variables_of(compose_text) if SECRET.search(variable.name)]

    assert len({variable.name for variable in secrets}) == 9
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
    example = dict(re.findall(r"^#(\w+)=(.*)$", (REPO / "deploy/compose.env.example").read_text(), re.MULTILINE))

    assert example == {variable.name: variable.default for variable in variables_of(compose_text)}


@pytest.mark.parametrize("name", SETTINGS_OF)
def test_a_service_is_told_only_what_its_settings_know(services: dict[str, Any], name: str):
    known = {field.upper() for kind in SETTINGS_OF[name] for field in kind.model_fields}

    assert set(services[name]["environment"]) - known == set()


@pytest.mark.parametrize("name", SETTINGS_OF)
def test_a_service_is_told_everything_that_its_settings_ask_for(services: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch):
    for kind in SETTINGS_OF[name]:
        for field in kind.model_fields:
            monkeypatch.delenv(field.upper(), raising=False)
    for variable, value in services[name]["environment"].items():
        monkeypatch.setenv(variable, str(value))

    for kind in SETTINGS_OF[name]:
        loaded = load(kind)
        if isinstance(loaded, BrokerSettings):
            loaded.load_fleet()


def test_a_worker_holds_no_key_of_the_object_store_and_only_the_gateway_has_the_pepper(services: dict[str, Any]):
    told = {name: set(service["environment"]) for name, service in services.items()}

    assert {name for name, variables in told.items() if "S3_SECRET_ACCESS_KEY" in variables} == {"api", "results"}
    assert {name for name, variables in told.items() if "API_KEY_PEPPER" in variables} == {"api"}
    assert {name for name, variables in told.items() if "MIGRATION_DATABASE_URL" in variables} == {"migrate"}
    assert {name for name, variables in told.items() if "DATABASE_URL" in variables} == {
        "migrate",
        "api",
        "worker",
        "results",
        "webhooks",
        "sweeper",
    }
    assert "storage" not in services["worker"]["networks"] + services["flower"]["networks"]


def test_addresses_lead_to_services_of_the_file(services: dict[str, Any]):
    for name in SETTINGS_OF:
        for variable, value in services[name]["environment"].items():
            if variable.endswith("_URL") and variable != "S3_PUBLIC_ENDPOINT_URL":
                host = urlsplit(value).hostname
                assert set(services[host]["networks"]) & set(services[name]["networks"]), (name, variable)


def test_passwords_are_the_same_on_both_sides(services: dict[str, Any]):
    def password(url: str) -> str | None:
        return urlsplit(services["migrate"]["environment"].get(url) or services["api"]["environment"][url]).password

    def option(service: str) -> str:
        command = services[service]["command"]
        return str(command[command.index("--requirepass") + 1])

    assert password("MIGRATION_DATABASE_URL") == services["postgres"]["environment"]["POSTGRES_PASSWORD"]
    assert password("BROKER_URL") == option("redis-broker") == services["redis-broker"]["environment"]["REDISCLI_AUTH"]
    assert password("HANDOFF_URL") == option("redis-handoff") == services["redis-handoff"]["environment"]["REDISCLI_AUTH"]
    for ours, theirs in {"S3_ACCESS_KEY_ID": "AWS_ACCESS_KEY_ID", "S3_SECRET_ACCESS_KEY": "AWS_SECRET_ACCESS_KEY"}.items():
        assert services["api"]["environment"][ours] == services["objectstore"]["environment"][theirs] != ""
    assert services["api"]["environment"]["S3_BUCKET"] == services["objectstore"]["environment"]["S3_BUCKET"]


def test_the_gateway_s_temporary_folder_holds_several_uploads_and_is_part_of_its_memory(services: dict[str, Any]):
    api = services["api"]
    [found] = [re.fullmatch(r"/tmp:size=(\d+)m,mode=1777", mount) for mount in api["tmpfs"]]
    memory = re.fullmatch(r"(\d+)m", str(api["mem_limit"]))

    assert found is not None
    assert memory is not None
    assert int(found[1]) * 2**20 * 4 // 5 >= 6 * int(api["environment"]["MAX_UPLOAD_BYTES"])
    assert int(memory[1]) >= 1024 + int(found[1])


def test_a_full_redis_refuses_rather_than_forgets(services: dict[str, Any]):
    def options(name: str) -> dict[str, str]:
        arguments = services[name]["command"][1:]
        return dict(zip(arguments[::2], arguments[1::2], strict=True))

    assert options("redis-broker").items() >= {"--maxmemory": "256mb", "--maxmemory-policy": "noeviction", "--appendonly": "yes"}.items()
    assert options("redis-handoff").items() >= {"--maxmemory": "1gb", "--maxmemory-policy": "noeviction", "--save": ""}.items()


def test_who_takes_in_work_stops_before_who_finishes_it(services: dict[str, Any]):
    for name in ("api", "worker"):
        assert {"results", "webhooks", "sweeper"} <= set(services[name]["depends_on"])
    for name in ("results", "webhooks", "sweeper"):
        assert {"postgres", "redis-broker", "redis-handoff"} <= set(services[name]["depends_on"])


def test_nobody_starts_before_the_tables_are_there(services: dict[str, Any]):
    after = {name for name, service in services.items() if "migrate" in service.get("depends_on", {})}

    assert after == {"api", "worker", "results", "webhooks", "sweeper"}
    assert all(services[name]["depends_on"]["migrate"] == {"condition": "service_completed_successfully"} for name in after)


def test_the_gpu_file_changes_the_worker_alone_and_builds_torch_with_cuda(services: dict[str, Any], gpu_services: dict[str, Any]):
    worker = gpu_services["worker"]
    (device,) = worker["deploy"]["resources"]["reservations"]["devices"]

    assert set(gpu_services) == {"worker"}
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert worker["build"]["args"] == {"TORCH_INDEX_URL": "", "PIP_FIND_LINKS": ""}
    assert worker["image"] != services["worker"]["image"]
