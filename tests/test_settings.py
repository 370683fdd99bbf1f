"""The environment, typed: a role starts with what it needs, and says by name what is missing."""

import os
import subprocess
import sys

import pytest
from pydantic_core import PydanticUndefined

from settings import (
    REPO,
    BrokerSettings,
    DeviceSettings,
    FlowerSettings,
    GatewaySettings,
    ServerSettings,
    Settings,
    StoreSettings,
    WorkerSettings,
    load,
    load_fleet_or_exit,
)

ENOUGH = {
    "BROKER_URL": "redis://127.0.0.1:1/0",
    "HANDOFF_URL": "redis://127.0.0.1:1/1",
    "DATABASE_URL": "postgresql+psycopg2://darkroom_app:database-secret@127.0.0.1:1/darkroom",
    "S3_BUCKET": "darkroom",
    "S3_ACCESS_KEY_ID": "access-key-id",
    "S3_SECRET_ACCESS_KEY": "store-secret",
    "API_KEY_PEPPER": "a pepper of sixteen letters",
    "FLOWER_PASSWORD": "flower-secret",
}
ROLES = [DeviceSettings, BrokerSettings, FlowerSettings, ServerSettings, Settings, WorkerSettings, StoreSettings, GatewaySettings]


def required(kind) -> list[str]:
    return [name.upper() for name, field in kind.model_fields.items() if field.default is PydanticUndefined]


@pytest.fixture
def environment(monkeypatch):
    """Enough for every role, and nothing of the machine's own."""
    for name in {name.upper() for kind in ROLES for name in kind.model_fields}:
        monkeypatch.delenv(name, raising=False)
    for name, value in ENOUGH.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def refusal(capsys, kind) -> list[str]:
    """What `load` prints before it ends the process."""
    with pytest.raises(SystemExit) as end:
        load(kind)
    assert end.value.code == 78
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("kind", ROLES)
def test_enough_is_enough(environment, kind):
    assert isinstance(load(kind), kind)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in ROLES for name in required(kind)])
def test_a_missing_variable_is_told_by_its_name(environment, capsys, kind, name):
    environment.delenv(name)

    assert refusal(capsys, kind) == [f"settings: {name}: field required"]


def test_all_missing_variables_are_told_at_once(environment, capsys):
    for name in ENOUGH:
        environment.delenv(name)

    told = {line.split(": ")[1] for line in refusal(capsys, GatewaySettings)}

    assert told == set(ENOUGH) - {"FLOWER_PASSWORD"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LEASE_TTL_S", "soon"),
        ("LEASE_TTL_S", "0"),
        ("MAX_ATTEMPTS", "0"),
        ("METRICS_PORT", "70000"),
        ("API_KEY_PEPPER", "short"),
        ("PRESIGN_TTL_S", "9999999"),
        ("MAX_WAIT_S", "61"),
        ("S3_CHECKSUMS", "sometimes"),
        ("CORS_ALLOWED_ORIGINS", "https://app.example/"),
        ("CORS_ALLOWED_ORIGINS", "app.test"),
        ("CORS_ALLOWED_ORIGINS", "*,https://app.example"),
        ("CORS_ALLOWED_ORIGINS", "null"),
        ("PUBLIC_URL", "gateway.test/darkroom"),
        ("PUBLIC_URL", "https://example.com/dark room"),
        ("PUBLIC_URL", "https://user:secret@example.com"),
        ("IMAGE_DELIVERY", "pigeon"),
    ],
)
def test_a_wrong_variable_is_told_by_its_name_and_without_its_value(environment, capsys, name, value):
    environment.setenv(name, value)

    [line] = refusal(capsys, GatewaySettings)

    assert line.startswith(f"settings: {name}: ")
    assert value not in line or value == "0"


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        (["-c", "import app.wsgi"], "API_KEY_PEPPER"),
        (["-m", "tasks.serve", "results"], "S3_BUCKET"),
        (["-m", "migrations"], "MIGRATION_DATABASE_URL"),
    ],
)
def test_a_process_does_not_start_without_a_variable_that_it_needs(command, missing):
    environment = {name: value for name, value in ENOUGH.items() if name != missing} | {"PATH": os.environ.get("PATH", "")}

    ended = subprocess.run([sys.executable, *command], cwd=REPO, env=environment, capture_output=True, text=True, timeout=60)

    assert ended.returncode == 78
    assert f"settings: {missing}: field required" in ended.stderr.splitlines()


@pytest.mark.parametrize(
    ("text", "told"), [("rank = first", "not TOML"), ("currency = 'EUR'", "tiers: Field required"), (None, "cannot be read")]
)
def test_a_wrong_fleet_file_ends_the_start_with_its_key(environment, capsys, tmp_path, text, told):
    file = tmp_path / "fleet.toml"
    if text is not None:
        file.write_text(text)
    environment.setenv("FLEET_FILE", str(file))

    with pytest.raises(SystemExit) as end:
        load_fleet_or_exit(load(BrokerSettings))

    first = capsys.readouterr().err.splitlines()[0]
    assert end.value.code == 78
    assert first.startswith("fleet.toml: ")
    assert told in first


def test_origins_and_the_public_address_are_read_as_people_write_them(environment):
    environment.setenv("CORS_ALLOWED_ORIGINS", "https://app.example, http://localhost:5173,capacitor://localhost ,http://[::1]:8080")
    environment.setenv("PUBLIC_URL", "https://example.com/darkroom/")

    settings = load(GatewaySettings)

    assert settings.cors_allowed_origins == "https://app.example,http://localhost:5173,capacitor://localhost,http://[::1]:8080"
    assert settings.public_url == "https://example.com/darkroom"


def test_settings_cannot_be_changed(environment):
    with pytest.raises(ValueError, match="frozen"):
        load(Settings).lease_ttl_s = 1


def test_a_worker_holds_neither_the_store_s_keys_nor_the_pepper(environment):
    held = str(load(WorkerSettings).model_dump())

    assert "store-secret" not in held
    assert "pepper" not in held


def test_a_results_worker_does_not_hold_the_pepper(environment):
    assert "pepper" not in str(load(StoreSettings).model_dump())


def test_secrets_do_not_show_when_settings_are_printed(environment):
    shown = repr(load(GatewaySettings)) + repr(load(FlowerSettings))

    for secret in ("store-secret", "a pepper of sixteen letters", "flower-secret"):
        assert secret not in shown
