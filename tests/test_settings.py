"""The environment, typed: a role starts with what it needs, and says by name what is missing."""

import os
import re
import subprocess
import sys
from collections.abc import Collection

import pytest
from pydantic_core import PydanticUndefined

from policy.fleet import Pool, Tier
from settings import (
    REPO,
    BrokerSettings,
    DeviceSettings,
    FlowerSettings,
    GatewayProcessSettings,
    GatewaySettings,
    MigrationSettings,
    ServerSettings,
    Settings,
    SettingsInvalid,
    StoreSettings,
    WebhookSettings,
    WorkerSettings,
    is_loopback,
    load,
    load_fleet_or_exit,
    misfits,
    read,
)
from tests.builders import a_fleet
from tests.documents import section, text_of

ENOUGH = {
    "BROKER_URL": "redis://127.0.0.1:1/0",
    "HANDOFF_URL": "redis://127.0.0.1:1/1",
    "DATABASE_URL": "postgresql+psycopg2://darkroom_app:database-secret@127.0.0.1:1/darkroom",
    "S3_BUCKET": "darkroom",
    "S3_ACCESS_KEY_ID": "access-key-id",
    "S3_SECRET_ACCESS_KEY": "store-secret",
    "API_KEY_PEPPER": "a pepper of sixteen letters",
    "FLOWER_PASSWORD": "flower-secret",
    "MIGRATION_DATABASE_URL": "postgresql://darkroom_owner:owner-secret@127.0.0.1:1/darkroom",
}
ROLES = [
    DeviceSettings,
    BrokerSettings,
    FlowerSettings,
    ServerSettings,
    Settings,
    WorkerSettings,
    WebhookSettings,
    StoreSettings,
    GatewaySettings,
    GatewayProcessSettings,
    MigrationSettings,
]
# What each process is started by, and a variable that it cannot do without.
PROCESSES = {
    "gateway": (
        ["-m", "gunicorn", "-c", "deploy/gunicorn.conf.py", "app.wsgi:application"],
        "API_KEY_PEPPER",
    ),
    "worker": (["-m", "fleet.worker"], "HANDOFF_URL"),
    "results": (["-m", "tasks.serve", "results"], "S3_BUCKET"),
    "sweeper": (["-m", "tasks.serve", "maintenance"], "DATABASE_URL"),
    "webhooks": (["-m", "tasks.serve", "webhooks"], "BROKER_URL"),
    "flower": (["-m", "tasks.serve", "flower"], "FLOWER_PASSWORD"),
    "migrations": (["-m", "migrations"], "MIGRATION_DATABASE_URL"),
}


def required(kind) -> list[str]:
    return [
        name.upper()
        for name, field in kind.model_fields.items()
        if field.default is PydanticUndefined
    ]


@pytest.fixture
def environment(monkeypatch):
    """Enough for every role, and nothing of the machine's own."""
    for name in {name.upper() for kind in ROLES for name in kind.model_fields}:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(f"{name}_FILE", raising=False)
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


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in ROLES for name in required(kind)]
)
def test_a_missing_variable_is_told_by_its_name(environment, capsys, kind, name):
    environment.delenv(name)

    [line] = refusal(capsys, kind)
    assert line.startswith(f"settings: {name}: is not set; accepted: ")


def test_an_empty_secret_is_told_as_one(environment, capsys):
    environment.setenv("S3_SECRET_ACCESS_KEY", "")

    assert refusal(capsys, StoreSettings) == [
        "settings: S3_SECRET_ACCESS_KEY: is empty; accepted: any text"
    ]


def test_all_missing_variables_are_told_at_once(environment, capsys):
    for name in ENOUGH:
        environment.delenv(name)

    told = {line.split(": ")[1] for line in refusal(capsys, GatewaySettings)}

    assert told == set(ENOUGH) - {"FLOWER_PASSWORD", "MIGRATION_DATABASE_URL"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LEASE_TTL_S", "soon"),
        ("LEASE_TTL_S", "0"),
        ("MAX_ATTEMPTS", "0"),
        ("METRICS_PORT", "70000"),
        ("API_KEY_PEPPER", "brief"),
        ("PRESIGN_TTL_S", "9999999"),
        ("MAX_WAIT_S", "61"),
        ("S3_CHECKSUMS", "sometimes"),
        ("S3_ADDRESSING_STYLE", "vhost"),
        ("S3_ENDPOINT_URL", "s3.example"),
        ("S3_ENDPOINT_URL", ""),
        ("LOG_LEVEL", "loud"),
        ("OUTBOUND_ALLOWED_NETWORKS", "here"),
        ("S3_SECRET_ACCESS_KEY", ""),
        ("DATABASE_URL", ""),
        ("ALLOW_DEVELOPMENT_SECRETS", "perhaps"),
        ("CORS_ALLOWED_ORIGINS", "https://app.example/"),
        ("CORS_ALLOWED_ORIGINS", "app.test"),
        ("CORS_ALLOWED_ORIGINS", "*,https://app.example"),
        ("CORS_ALLOWED_ORIGINS", "null"),
        ("PUBLIC_URL", "gateway.test/darkroom"),
        ("PUBLIC_URL", "https://example.com/dark room"),
        ("PUBLIC_URL", "https://user:secret@example.com"),
        ("PUBLIC_URL", "https://example.com/v1"),
        ("IMAGE_DELIVERY", "pigeon"),
    ],
)
def test_a_wrong_variable_is_told_by_its_name_and_without_its_value(
    environment, capsys, name, value
):
    environment.setenv(name, value)

    [line] = refusal(capsys, GatewaySettings)

    assert line.startswith(f"settings: {name}: ")
    assert "; accepted: " in line
    assert value not in line or value in ("0", "")


@pytest.mark.parametrize(
    "url", ["postgres://u:p@h/d", "postgresql://u:p@h/d", "postgresql+psycopg2://u:p@h/d"]
)
def test_every_way_to_write_a_postgres_url_is_taken(environment, url):
    environment.setenv("DATABASE_URL", url)

    assert load(Settings).database_url == "postgresql+psycopg2://u:p@h/d"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"GATEWAY_MAX_WAITS": "120", "GATEWAY_MAX_UPLOADS": "8"},
            "GATEWAY_THREADS: is too few; "
            "accepted: more than GATEWAY_MAX_WAITS (120) and GATEWAY_MAX_UPLOADS (8) together",
        ),
        (
            {"GATEWAY_MAX_CONNECTIONS": "640"},
            "GATEWAY_MAX_CONNECTIONS: is too few; "
            "accepted: more than GATEWAY_THREADS and GATEWAY_MAX_STREAMS together (640)",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_told_together(environment, capsys, changes, told):
    for name, value in changes.items():
        environment.setenv(name, value)

    assert refusal(capsys, ServerSettings) == [f"settings: {told}"]


@pytest.mark.parametrize("threads", ["4", "8", "640"])
def test_most_threads_are_left_to_short_requests_however_many_there_are(environment, threads):
    environment.setenv("GATEWAY_THREADS", threads)
    environment.setenv("GATEWAY_MAX_CONNECTIONS", "10000")

    settings = load(ServerSettings)

    assert 0 < settings.max_waits + settings.max_uploads < settings.gateway_threads


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("DATABASE_URL", "mysql://u:tulip@h/d", "begins with mysql://"),
        ("DATABASE_URL", "postgresql+asyncpg://u:tulip@h/d", "begins with postgresql+asyncpg://"),
        ("DATABASE_URL", "u:tulip@h/d", "is not a URL"),
        ("DATABASE_URL", "postgres://u:tu/lip@h/d", "must be percent-encoded"),
        ("DATABASE_URL", "postgres://u:tu@lip@h/d", "must be percent-encoded"),
        ("DATABASE_URL", "postgres://u:@h/d", "its password is empty"),
        ("BROKER_URL", "amqp://u:tulip@h", "begins with amqp://"),
        ("BROKER_URL", "redis://:@h/0", "its password is empty"),
        ("BROKER_URL", "redis:///0", "names no host"),
        ("BROKER_URL", "redis://h/tasks", "is not the number of a database"),
        (
            "HANDOFF_URL",
            "rediss://h/0?ssl_cert_reqs=CERT_NONE",
            "accepted: none, optional, required",
        ),
    ],
)
def test_a_wrong_url_is_told_without_its_password(environment, capsys, name, value, told):
    environment.setenv(name, value)

    [line] = refusal(capsys, GatewaySettings)

    assert line.startswith(f"settings: {name}: ")
    assert told in line
    assert not any(secret in line for secret in ("tulip", "tu/lip", "tu@lip"))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (
            {"LEASE_RENEW_S": "12"},
            "LEASE_STOP_S: must be more than LEASE_RENEW_S (12), or no worker could renew in "
            "time, and less",
        ),
        (
            {"LEASE_STOP_S": "15"},
            "LEASE_STOP_S: must be more than LEASE_RENEW_S (5), or no worker could renew in "
            "time, and less",
        ),
        (
            {"LEASE_TTL_S": "12"},
            "LEASE_STOP_S: must be more than LEASE_RENEW_S (5), or no worker could renew in "
            "time, and less",
        ),
        (
            {"LEASE_TTL_S": "4"},
            "LEASE_STOP_S: must be more than LEASE_RENEW_S (5), or no worker could renew in time,"
            " and less than LEASE_TTL_S (4), or two would render one job",
        ),
        ({"STORE_WITHIN_S": "3600"}, "STORE_WITHIN_S: must be less than HANDOFF_TTL_S"),
        (
            {"HANDOFF_URL": "redis://:other@127.0.0.1:1/0"},
            "HANDOFF_URL: is the Redis database of BROKER_URL",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(environment, capsys, changed, named):
    for name, value in changed.items():
        environment.setenv(name, value)

    [line] = refusal(capsys, WorkerSettings)

    assert line.startswith(f"settings: {named}")


def test_settings_that_do_not_go_with_the_fleet_are_refused(environment):
    environment.setenv("WORKER_POOL", "elsewhere")
    environment.setenv("HANDOFF_TTL_S", "60")
    settings = load(WorkerSettings)

    told = misfits(settings, settings.load_fleet())

    assert told[0] == "WORKER_POOL: is not a pool of fleet.toml; accepted: local"
    assert {line.partition(":")[0] for line in told[1:]} == {"HANDOFF_TTL_S"}


@pytest.mark.parametrize(
    ("said", "classes", "told"),
    [
        (
            "sport",
            {"spot": {}, "mine": {}},
            "'sport' is not one of its capacity classes; accepted: spot, mine",
        ),
        ("", {"spot": {}, "mine": {}}, "a worker must say of which of its capacity classes it is"),
        ("spot", {}, "'spot' is not one of its capacity classes; accepted: none"),
        ("", {"spot": {}}, None),
        ("spot", {"spot": {}, "mine": {}}, None),
    ],
)
def test_class_that_the_worker_s_pool_has_not_is_refused(environment, said, classes, told):
    environment.setenv("WORKER_CLASS", said)

    problems = misfits(load(WorkerSettings), a_fleet({"pools.local.classes": classes}))

    assert (
        problems == []
        if told is None
        else problems[0].startswith(f"WORKER_CLASS: pool 'local': {told}")
    )


def test_a_secret_may_come_from_a_file(environment, tmp_path):
    secret = tmp_path / "pepper"
    secret.write_text("a pepper out of a file\n")
    environment.delenv("API_KEY_PEPPER")
    environment.setenv("API_KEY_PEPPER_FILE", str(secret))

    assert load(GatewaySettings).api_key_pepper.get_secret_value() == "a pepper out of a file"


def test_a_secret_twice_is_refused(environment, capsys, tmp_path):
    environment.setenv("API_KEY_PEPPER_FILE", str(tmp_path))

    assert refusal(capsys, GatewaySettings) == [
        "settings: API_KEY_PEPPER_FILE: API_KEY_PEPPER is set as well; keep one of the two"
    ]


def test_a_secret_s_file_that_cannot_be_read_is_named(environment, capsys, tmp_path):
    environment.delenv("API_KEY_PEPPER")
    environment.setenv("API_KEY_PEPPER_FILE", str(tmp_path / "nothing"))

    [line] = refusal(capsys, GatewaySettings)

    assert line == (
        f"settings: API_KEY_PEPPER_FILE: {tmp_path}/nothing cannot be read (No such file or "
        "directory)"
    )


@pytest.mark.parametrize(
    ("place", "stays_here"),
    [
        ("127.0.0.1:8080", True),
        ("[::1]:8080", True),
        ("localhost:8080", True),
        ("http://127.0.0.1:8333", True),
        ("0.0.0.0:8080", False),
        ("8080", False),
        ("192.168.1.4:8080", False),
        ("https://images.example.com", False),
    ],
)
def test_loopback_places_are_told_from_others(place, stays_here):
    assert is_loopback(place) is stays_here


@pytest.mark.parametrize(
    "published",
    [
        {"PUBLISHED_AT": "127.0.0.1:8080,0.0.0.0:8333"},
        {"PUBLISHED_AT": "8080"},
        {"S3_PUBLIC_ENDPOINT_URL": "https://images.example.com"},
        {"GATEWAY_BIND": "0.0.0.0:8080"},
    ],
)
def test_secrets_from_the_repository_are_refused_beyond_the_loopback(
    environment, capsys, published
):
    environment.setenv("API_KEY_PEPPER", "development-only-pepper")
    environment.setenv(
        "DATABASE_URL", "postgresql://darkroom_app:development-only-app@postgres/darkroom"
    )
    for name, value in published.items():
        environment.setenv(name, value)

    told = refusal(capsys, GatewayProcessSettings)

    assert {line.split(": ")[1] for line in told} == {"API_KEY_PEPPER", "DATABASE_URL"}
    assert all("ALLOW_DEVELOPMENT_SECRETS" in line for line in told)

    environment.setenv("ALLOW_DEVELOPMENT_SECRETS", "true")
    assert load(GatewayProcessSettings).allow_development_secrets


def test_secrets_from_the_repository_will_do_on_the_loopback(environment):
    environment.setenv("API_KEY_PEPPER", "development-only-pepper")
    # of a container, whose port is published on the loopback
    environment.setenv("GATEWAY_BIND", "0.0.0.0:8080")
    environment.setenv("PUBLISHED_AT", "127.0.0.1:8080,127.0.0.1:8333")

    assert load(GatewayProcessSettings).hints() == []


def test_links_that_lead_to_the_client_s_own_machine_are_told(environment):
    environment.setenv("S3_PUBLIC_ENDPOINT_URL", "http://127.0.0.1:8333")
    environment.setenv("PUBLISHED_AT", "0.0.0.0:8080")

    [hint] = load(GatewayProcessSettings).hints()

    assert hint.startswith("S3_PUBLIC_ENDPOINT_URL: links to images lead to http://127.0.0.1:8333")


def test_an_environment_of_another_process_can_be_read(environment):
    with pytest.raises(SettingsInvalid, match="BROKER_URL: is not set"):
        read(Settings, {name: value for name, value in ENOUGH.items() if name != "BROKER_URL"})

    assert isinstance(load(Settings), Settings)


def ended(command: list[str], environment: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    """A process that is expected to end by itself."""
    whole = {"PATH": os.environ.get("PATH", ""), **environment}
    return subprocess.run(
        [sys.executable, *command], cwd=REPO, env=whole, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("process", PROCESSES)
def test_a_process_does_not_start_without_a_variable_that_it_needs(process):
    command, missing = PROCESSES[process]

    end = ended(command, {name: value for name, value in ENOUGH.items() if name != missing})

    assert end.returncode == 78
    [line] = end.stderr.splitlines()
    assert line.startswith(f"settings: {missing}: is not set; accepted: ")


@pytest.mark.parametrize("process", [name for name in PROCESSES if name != "migrations"])
def test_a_process_does_not_start_with_a_wrong_fleet_file(process, tmp_path):
    (tmp_path / "fleet.toml").write_text(
        (REPO / "fleet.toml").read_text().replace("rank = 0", "rank = -1")
    )

    end = ended(PROCESSES[process][0], ENOUGH | {"FLEET_FILE": str(tmp_path / "fleet.toml")})

    assert end.returncode == 78
    *_, line = end.stderr.splitlines()
    assert line.startswith("fleet.toml: tiers.fast.rank: ")


def test_a_model_that_is_not_there_ends_the_worker(tmp_path):
    (tmp_path / "fleet.toml").write_text(
        (REPO / "fleet.toml").read_text().replace("pocket/checkpoint", "pocket/nothing")
    )

    end = ended(
        ["-m", "tasks.serve", "render"],
        ENOUGH | {"FLEET_FILE": str(tmp_path / "fleet.toml"), "DEVICE": "cpu"},
    )

    assert end.returncode == 78
    told = end.stderr.splitlines()[-1]
    assert told.startswith("model 'pocket', version '1' (")
    assert "pocket/nothing) cannot be loaded: " in told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("rank = first", "not TOML"),
        ("currency = 'EUR'", "tiers: Field required"),
        (None, "cannot be read"),
        ("folder", "is a folder"),
    ],
)
def test_a_wrong_fleet_file_ends_the_start_with_its_key(environment, capsys, tmp_path, text, told):
    file = tmp_path / "fleet.toml"
    if text == "folder":
        file.mkdir()
    elif text is not None:
        file.write_text(text)
    environment.setenv("FLEET_FILE", str(file))

    with pytest.raises(SystemExit) as end:
        load_fleet_or_exit(load(BrokerSettings))

    first = capsys.readouterr().err.splitlines()[0]
    assert end.value.code == 78
    assert first.startswith("fleet.toml: ")
    assert told in first


def test_origins_and_the_public_address_are_read_as_people_write_them(environment):
    environment.setenv(
        "CORS_ALLOWED_ORIGINS",
        "https://app.example, http://localhost:5173,capacitor://localhost ,http://[::1]:8080",
    )
    environment.setenv("PUBLIC_URL", "https://example.com/darkroom/")

    settings = load(GatewaySettings)

    assert (
        settings.cors_allowed_origins
        == "https://app.example,http://localhost:5173,capacitor://localhost,http://[::1]:8080"
    )
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


# A default that docs/settings.md says in words, by its variable.
SAID_IN_WORDS = {
    "FLEET_FILE": ("`fleet.toml` in the repository", REPO / "fleet.toml"),
    "CHECKPOINT_ROOT": ("the repository", REPO),
    "CUDA_VISIBLE_DEVICES": ("all", None),
    "WORKER_NAME": ("`POOL-gpuN@host`", ""),
    "S3_ENDPOINT_URL": ("AWS", None),
    "MODEL_S3_ENDPOINT_URL": ("AWS", None),
    "S3_PUBLIC_ENDPOINT_URL": ("the same", None),
    "GATEWAY_MAX_WAITS": ("half", None),
    "GATEWAY_MAX_UPLOADS": ("an eighth of the threads", None),
    "UPLOAD_SPOOL_BYTES": ("4/5 of what is free", None),
}


def shown_in(text: str, names: Collection[str]) -> dict[str, str]:
    """The defaults of these names that the tables of a text show in their column `default`."""
    shown: dict[str, str] = {}
    column = 0
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if not line.startswith("|"):
            column = 0
        elif "default" in cells:
            column = cells.index("default")
        elif column:
            said = re.findall(r"`(\w+)`", cells[1])
            told = re.split(r", ?", cells[column]) if len(said) > 1 else [cells[column]]
            if set(said) & set(names):
                shown |= dict(zip(said, told, strict=True))
    return shown


def as_shown(name: str, default: object) -> str:
    """How a page shows a default."""
    if name in SAID_IN_WORDS:
        words, meant = SAID_IN_WORDS[name]
        assert default == meant
        return words
    if default is PydanticUndefined:
        return "required"
    if default in (None, "", (), {}):
        return "none"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    return f"`{default:g}`" if isinstance(default, float) else f"`{default}`"


def test_the_page_on_settings_shows_every_default():
    defaults = {
        name.upper(): field.default for kind in ROLES for name, field in kind.model_fields.items()
    }

    shown = shown_in(text_of("docs/settings.md"), defaults)

    assert shown == {name: as_shown(name, default) for name, default in defaults.items()}


@pytest.mark.parametrize(("heading", "table"), [("## Tiers", Tier), ("## Pools", Pool)])
def test_the_page_on_models_shows_the_defaults_of_tiers_and_pools(heading, table):
    defaults = {
        name: field.get_default(call_default_factory=True)
        for name, field in table.model_fields.items()
    }

    shown = shown_in(section("docs/models.md", heading), defaults)

    assert shown == {name: as_shown(name, default) for name, default in defaults.items()}


def test_the_page_on_settings_shows_what_a_wrong_setting_prints():
    page = text_of("docs/settings.md")
    wrong = {"DATABASE_URL": "mysql://h/d", "LEASE_STOP_S": "15", "API_KEY_PEPPER": "brief"}

    def told(changes) -> list[str]:
        with pytest.raises(SettingsInvalid) as refused:
            read(GatewaySettings, ENOUGH | changes)
        return refused.value.problems

    lines = [f"settings: {line}" for name, value in wrong.items() for line in told({name: value})]
    assert [line for line in page.splitlines() if line.startswith("settings: ")] == lines
