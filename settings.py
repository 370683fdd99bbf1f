"""The environment, typed: the only module that reads it.

Every role reads its own class and so holds no secret that it does not need: a GPU worker never
sees an S3 key, a results worker never sees the pepper of the API keys.

FleetSettings                fleet.toml
├── DeviceSettings           + the worker's device, and the folder of its checkpoints (calibration)
└── BrokerSettings           + the broker
    ├── FlowerSettings       + the user and password that Flower asks for
    └── Settings             + Postgres and the hand-off (sweeper)
        ├── WorkerSettings   + those of the device
        ├── WebhookSettings  + the private networks it may reach (webhooks)
        └── StoreSettings    + the object store (results worker)
            └── GatewaySettings  + the API key pepper and the limits of requests
StreamSettings               the threads of a gateway process, by use (also the gateway's)
└── ServerSettings           + how gunicorn listens
OutboundSettings             private networks that outgoing requests may reach (gateway, webhooks)
PublicSettings               where clients reach the gateway (gateway, webhooks)
ServerSettings               how gunicorn listens
└── GatewayProcessSettings   + all of the gateway's: gunicorn's master checks them at start

Every variable NAME may be given as NAME_FILE, the path of a file that holds its value; Docker and
Kubernetes provide secrets that way. A missing or wrong variable ends the process with exit code 78
and one line per variable. No line contains a value.
"""

import ipaddress
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Self, TypeVar
from urllib.parse import parse_qs, urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from policy.fleet import Fleet, FleetInvalid, parse_fleet
from policy.workers import class_problem

REPO = Path(__file__).resolve().parent
EX_CONFIG = 78  # sysexits.h: whoever supervises us knows that another start will not help
EX_DEVICE_LOST = 74  # EX_IOERR: a worker's device broke or hangs, and no job is to blame
DEVELOPMENT_ONLY = "development-only"  # in every secret that docker-compose.yml has a default for
_ORIGIN = re.compile(
    r"[a-z][a-z0-9+.-]*://[a-z0-9._-]+(:[0-9]{1,5})?|https?://\[[0-9a-f:.]+\](:[0-9]{1,5})?"
)
PATH_PREFIX = re.compile(r"(/(?!\.\.?(/|$))[A-Za-z0-9._~-]+){1,8}")  # no . or .. among its parts
# First segments of the gateway's own paths.
ROUTES = ("v1", "healthz", "readyz", "docs", "static", "links", "problems", "openapi.json")
SMALL_BODY_BYTES = 65_536  # of a request: is read by gunicorn's loop before a thread is taken


class SettingsInvalid(Exception):
    """The environment cannot be used; `problems` holds one line per variable, without its value."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


def _authority(text: str) -> None:
    """Check the part of a URL between // and the path.

    Raises ValueError; its message contains no part of the URL.
    """
    parts = urlsplit(f"any:{text}")
    encode = "a password with @ : / ? # % in it must be percent-encoded"
    try:
        port_is_sound = parts.port is None or parts.port > 0
    except ValueError:
        port_is_sound = False
    if not port_is_sound:
        raise ValueError(f"its port is not a number from 1 to 65535; {encode}")
    if parts.netloc.count("@") > 1:
        raise ValueError(f"there is more than one @ before its path; {encode}")
    if parts.password == "":
        raise ValueError("its password is empty")


def _scheme(text: str, accepted: str) -> tuple[str, str]:
    """Split a URL into its scheme and the rest from // on. Raises ValueError."""
    scheme, separator, rest = text.partition("://")
    if not text:
        raise ValueError(f"is empty; accepted: {accepted}")
    if not separator:
        raise ValueError(f"is not a URL; accepted: {accepted}")
    return scheme.lower(), f"//{rest}"


def as_postgres_url(text: str) -> str:
    """Return the URL in the form that SQLAlchemy reads, with psycopg2 as the driver.

    Accepts `postgres://` and `postgresql://`, too. Raises ValueError.
    """
    accepted = "postgresql://USER:PASSWORD@HOST:PORT/DATABASE"
    scheme, rest = _scheme(text, accepted)
    if scheme not in ("postgres", "postgresql", "postgresql+psycopg2"):
        known = scheme if re.fullmatch(r"[a-z][a-z0-9+.-]{0,30}", scheme) else "something else"
        raise ValueError(
            f"begins with {known}://; accepted: {accepted}, also with postgres:// or postgresql+psycopg2://"
        )
    _authority(rest)
    return f"postgresql+psycopg2:{rest}"


def _redis_url(text: str) -> str:
    accepted = "redis://USER:PASSWORD@HOST:PORT/NUMBER, with TLS rediss://"
    scheme, rest = _scheme(text, accepted)
    if scheme not in ("redis", "rediss"):
        known = scheme if re.fullmatch(r"[a-z][a-z0-9+.-]{0,30}", scheme) else "something else"
        raise ValueError(f"begins with {known}://; accepted: {accepted}")
    _authority(rest)
    parts = urlsplit(f"any:{rest}")
    if not parts.hostname:
        raise ValueError(f"names no host; accepted: {accepted}")
    if parts.path.strip("/") and not parts.path.strip("/").isdigit():
        raise ValueError(f"its path is not the number of a database; accepted: {accepted}")
    if not set(parse_qs(parts.query).get("ssl_cert_reqs", [])) <= {"none", "optional", "required"}:
        raise ValueError("its ssl_cert_reqs is unknown; accepted: none, optional, required")
    return f"{scheme}:{rest}"


def _http_url(text: str) -> str:
    accepted = "http://HOST:PORT or https://HOST:PORT"
    scheme, rest = _scheme(text, accepted)
    if scheme not in ("http", "https") or not urlsplit(f"any:{rest}").hostname:
        raise ValueError(f"is not a URL of HTTP; accepted: {accepted}")
    _authority(rest)
    return text


def _listener(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError("is not an address to listen on; accepted: HOST:PORT, as 127.0.0.1:8080")
    return text


PostgresUrl = Annotated[str, AfterValidator(as_postgres_url)]
RedisUrl = Annotated[str, AfterValidator(_redis_url)]
HttpUrl = Annotated[str, AfterValidator(_http_url)]
Listener = Annotated[str, AfterValidator(_listener)]
LogLevel = Annotated[
    Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"],
    BeforeValidator(lambda text: str(text).upper()),
]

# None: the process's own
_environment: ContextVar[Mapping[str, str] | None] = ContextVar("_environment", default=None)


class _Variables(EnvSettingsSource):
    """Read variables; for each NAME that is not set, read the file that NAME_FILE names."""

    def _load_env_vars(self) -> Mapping[str, str | None]:
        environment = _environment.get()
        found: dict[str, str | None] = {
            name.lower(): text
            for name, text in (os.environ if environment is None else environment).items()
        }
        problems = []
        for name in self.settings_cls.model_fields:
            path = found.get(f"{name}_file")
            if path is None:
                continue
            variable = name.upper()
            if name in found:
                problems.append(f"{variable}_FILE: {variable} is set as well; keep one of the two")
                continue
            try:
                found[name] = Path(path).read_text().rstrip("\r\n")
            except (OSError, UnicodeDecodeError) as error:
                problems.append(f"{variable}_FILE: {unreadable(Path(path), error)}")
        if problems:
            raise SettingsInvalid(problems)
        return found


class Environment(BaseSettings):
    """Hold what every class of settings has. Variables are the field names in capitals."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore")

    log_level: LogLevel = "INFO"
    # Where clients and browsers reach this deployment: addresses or URLs, with commas
    published_at: str = ""
    allow_development_secrets: bool = False  # also beyond the loopback

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, _Variables(settings_cls)

    @model_validator(mode="after")
    def _has_secrets_of_its_own(self) -> Self:
        """Refuse secrets that anybody can read in the repository once anybody can come by."""
        places = [place for place in self.published() if not is_loopback(place)]
        if not places or self.allow_development_secrets:
            return self
        why = f"holds a {DEVELOPMENT_ONLY} secret, and {places[0]} is beyond the loopback"
        cure = "set a secret of your own; ALLOW_DEVELOPMENT_SECRETS=true lets it pass"
        held = [
            name.upper()
            for name in type(self).model_fields
            if DEVELOPMENT_ONLY in _plain(getattr(self, name))
        ]
        if held:
            raise ValueError("\n".join(f"{name}: {why}; {cure}" for name in held))
        return self

    def published(self) -> list[str]:
        """List the addresses at which others reach this deployment, as far as this process knows.

        PUBLISHED_AT wins; without it, the process's own listeners count. A container listens on all
        its interfaces and Docker publishes it, so only PUBLISHED_AT can name the real address.
        """
        told = [place.strip() for place in self.published_at.split(",") if place.strip()]
        own = [getattr(self, name, "") for name in ("gateway_bind", "flower_bind")]
        public = getattr(self, "s3_public_endpoint_url", None)
        return [*(told or filter(None, own)), *([public] if public else [])]


class FleetSettings(Environment):
    """Hold the settings that every process needs."""

    fleet_file: Path = REPO / "fleet.toml"

    def load_fleet(self) -> Fleet:
        """Read and validate fleet.toml.

        Raises FleetInvalid, which names the key of every wrong line.
        """
        try:
            text = self.fleet_file.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise FleetInvalid([unreadable(self.fleet_file, error)]) from None
        return parse_fleet(text)


class DeviceSettings(FleetSettings):
    """Hold what an engine is started with."""

    # The first visible GPU with auto, or the CPU where there is none.
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda, cuda:NUMBER"
    )
    torch_threads: int = Field(1, ge=1)  # part of the fingerprint; 1 on a shared CPU machine
    # What cuBLAS and cuBLASLt read themselves, "" where nobody says; part of the fingerprint.
    cublas_workspace_config: str = Field("", pattern=r"^((:\d+:\d+)+)?$", description=":KiB:NUMBER")
    cublaslt_workspace_size: str = Field("", pattern=r"^\d*$", description="KiB")
    checkpoint_root: Path = REPO  # where relative paths of fleet.toml start
    # Holds the curves of `darkroom calibrate`; None: every start measures its own.
    curves_folder: Path | None = None
    # Holds what is fetched from S3 or the hub; None: only folders of this machine are served.
    model_cache_dir: Path | None = None
    model_cache_gb: float = Field(200.0, gt=0)  # of 10^9 bytes; what is held longest unused goes
    # The bucket of weights, and keys that may read it; without keys the machine's own role is used.
    model_s3_endpoint_url: HttpUrl | None = None  # None = AWS
    model_s3_region: str = "us-east-1"
    model_s3_access_key_id: SecretStr | None = Field(None, min_length=1)
    model_s3_secret_access_key: SecretStr | None = Field(None, min_length=1)
    hf_endpoint: HttpUrl = "https://huggingface.co"
    hf_token: SecretStr | None = Field(None, min_length=1)  # for repositories that ask for one


class BrokerSettings(FleetSettings):
    """Hold what a process needs to know the queues."""

    broker_url: RedisUrl  # Redis of Celery's queues; noeviction, holds ids only


class FlowerSettings(BrokerSettings):
    """Hold Flower's settings; Flower asks for this user and password."""

    flower_user: str = Field("operator", min_length=1)
    flower_password: SecretStr = Field(min_length=8)
    flower_bind: Listener = "127.0.0.1:5555"


class StreamSettings(Environment):
    """Hold what gunicorn and the gateway inside it must agree on."""

    # Live event streams of one process; each holds a thread of its own.
    gateway_max_streams: int = Field(512, ge=1)
    # Threads besides those of streams. A waiting client holds one, not a database connection.
    gateway_threads: int = Field(128, ge=4)
    # Clients of one process that wait for a job's end; None: half of the threads.
    gateway_max_waits: int | None = Field(None, ge=1)
    # Bodies over 64 KiB that are received at once; None: an eighth of the threads.
    gateway_max_uploads: int | None = Field(None, ge=1)
    # Bytes of uploads in the temporary folder; None: four fifths of what is free at start.
    upload_spool_bytes: int | None = Field(None, ge=1)
    web_concurrency: int = Field(1, ge=1)  # processes

    @property
    def max_waits(self) -> int:
        """Return how many clients of one process may wait for a job's end."""
        return self.gateway_max_waits or self.gateway_threads // 2

    @property
    def max_uploads(self) -> int:
        """Return how many large bodies one process may read at once."""
        return self.gateway_max_uploads or max(1, self.gateway_threads // 8)

    @model_validator(mode="after")
    def _leaves_threads_to_others(self) -> Self:
        if self.max_waits + self.max_uploads >= self.gateway_threads:
            held = (
                f"GATEWAY_MAX_WAITS ({self.max_waits}) and "
                f"GATEWAY_MAX_UPLOADS ({self.max_uploads}) together"
            )
            raise ValueError(f"GATEWAY_THREADS: is too few; accepted: more than {held}")
        return self


class ServerSettings(StreamSettings):
    """Hold how gunicorn listens, and how long it waits for a client."""

    gateway_bind: Listener = "127.0.0.1:8080"
    # Connections of one process; beyond, the one that was silent for longest is closed.
    gateway_max_connections: int = Field(8192, ge=64)
    # Longer than load balancers keep a connection (60 s), or they use one that we just closed.
    keepalive_s: int = Field(75, ge=1)
    header_timeout_s: float = Field(10.0, gt=0)  # for the head of a request
    # For a request's body, plus the time that its bytes take at gateway_min_bytes_per_s.
    body_timeout_s: float = Field(20.0, gt=0)
    gateway_min_bytes_per_s: int = Field(32_768, ge=1)
    # Memory for all incomplete requests; as much again for all unsent answers.
    gateway_buffer_bytes: int = Field(134_217_728, ge=1_048_576)
    metrics_port: int = Field(0, ge=0, le=65535)
    metrics_host: str = "127.0.0.1"

    @model_validator(mode="after")
    def _has_connections_to_spare(self) -> Self:
        threads = self.gateway_threads + self.gateway_max_streams
        if self.gateway_max_connections <= threads:
            least = f"GATEWAY_THREADS and GATEWAY_MAX_STREAMS together ({threads})"
            raise ValueError(f"GATEWAY_MAX_CONNECTIONS: is too few; accepted: more than {least}")
        return self


class Settings(BrokerSettings):
    """Hold what every process that moves jobs needs."""

    # Go by the newest revision of the fleet in Postgres; false: by FLEET_FILE alone.
    follow_revisions: bool = True

    database_url: PostgresUrl  # of the role of this kind of process (migrations/roles.py)
    # Another Redis: decoded pixels on their way to storage, progress, cancels
    handoff_url: RedisUrl

    # A worker renews every 5 s: three missed renewals lose the lease.
    lease_ttl_s: float = Field(15.0, gt=0)
    lease_renew_s: float = Field(5.0, gt=0)
    # After this long without a renewal the worker drops its own work.
    lease_stop_s: float = Field(12.0, gt=0)
    sweep_every_s: float = Field(2.0, gt=0)
    max_attempts: int = Field(5, ge=1)  # lease losses and errors count, preemptions do not
    # The sweeper looks at a storing job past this deadline.
    store_within_s: float = Field(10.0, gt=0)
    handoff_ttl_s: int = Field(3600, ge=60)
    database_pool_size: int = Field(10, ge=1)
    metrics_port: int = Field(0, ge=0, le=65535)  # Prometheus text on metrics_host; 0 = none
    metrics_host: str = "127.0.0.1"

    @model_validator(mode="after")
    def _agree(self) -> Self:
        """Refuse values that are valid one by one and conflict together."""
        problems = []
        if not self.lease_renew_s < self.lease_stop_s < self.lease_ttl_s:
            problems.append(
                f"LEASE_STOP_S: must be more than LEASE_RENEW_S ({self.lease_renew_s:g}), "
                "or no worker could renew in time, "
                f"and less than LEASE_TTL_S ({self.lease_ttl_s:g}), or two would render one job"
            )
        if not self.store_within_s < self.handoff_ttl_s:
            problems.append(
                f"STORE_WITHIN_S: must be less than HANDOFF_TTL_S ({self.handoff_ttl_s}): "
                "pixels would be gone when looked for"
            )
        if _server(self.broker_url) == _server(self.handoff_url):
            problems.append(
                "HANDOFF_URL: is the Redis database of BROKER_URL; "
                "one full of pixels would take no messages: use another Redis"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self


class WorkerSettings(Settings, DeviceSettings):
    """Hold a GPU worker's settings; its pool decides which models it holds."""

    worker_pool: str = "local"  # a pool of fleet.toml
    # A capacity class of the pool; "": its only one, or none if it has none.
    worker_class: str = ""
    worker_name: str = ""  # POOL-gpuN@host; the launcher sets it
    # Source of notices that the machine will be taken away: aws, gcp, azure or file:/PATH, in
    # which {worker} stands for the worker's name.
    preemption_notices: str = ""
    # A longer turn of the engine, or a load that does not move for longer, means that the device
    # hangs: the worker ends.
    engine_stuck_after_s: float = Field(300.0, gt=0)
    # The same of a piece of a warm-up that compiles, where that is more.
    warm_up_stuck_after_s: float = Field(900.0, gt=0)
    # Workers that share this file load one after the other; None: one in the temporary folder.
    load_lock_file: Path | None = None
    # Time to finish after SIGTERM; must be less than the sender waits before SIGKILL.
    shutdown_notice_s: float = Field(20.0, gt=0, le=3600)
    # The launcher starts a process for each of these GPUs; unset = all.
    cuda_visible_devices: str | None = None


class StoreSettings(Settings):
    """Hold what is needed to reach the object store, any that speaks S3."""

    s3_bucket: str = Field(min_length=3)
    s3_access_key_id: SecretStr = Field(min_length=1)
    s3_secret_access_key: SecretStr = Field(min_length=1)
    s3_endpoint_url: HttpUrl | None = None  # None = AWS
    s3_public_endpoint_url: HttpUrl | None = None  # what clients can reach; presigned URLs carry it
    # auto: path if an endpoint is set, else what AWS prefers.
    s3_addressing_style: Literal["auto", "path", "virtual"] = "auto"
    s3_region: str = "us-east-1"
    # older servers refuse CRC trailers
    s3_checksums: Literal["when_required", "when_supported"] = "when_required"
    # OpenAI's clients are told that a URL lives for 60 minutes
    presign_ttl_s: int = Field(3600, ge=1, le=604_800)


class OutboundSettings(Environment):
    """Hold what a process needs to send requests to addresses that tenants choose."""

    # CIDRs of private networks that may be reached, as "10.2.0.0/16, 127.0.0.1/32".
    outbound_allowed_networks: str = ""

    @field_validator("outbound_allowed_networks")
    @classmethod
    def _are_networks(cls, text: str) -> str:
        for part in filter(None, (part.strip() for part in text.split(","))):
            try:
                ipaddress.ip_network(part)
            except ValueError:
                raise ValueError(
                    "is not a list of networks; accepted: networks as 10.2.0.0/16, with commas"
                ) from None
        return text


class PublicSettings(Environment):
    """Hold what a process needs to write links to the gateway."""

    # The gateway as clients reach it, with the path prefix of a proxy:
    # https://images.example.com/darkroom.
    public_url: str = ""

    @field_validator("public_url")
    @classmethod
    def _is_an_address(cls, text: str) -> str:
        text = text.rstrip("/")
        parts = urlsplit(text)
        is_plain = (
            parts.scheme in ("http", "https")
            and parts.hostname
            and not (parts.query or parts.fragment or parts.username)
        )
        if parts.path.strip("/").partition("/")[0] in ROUTES:
            raise ValueError(
                f"its path begins as our own routes do; accepted: any but /{', /'.join(ROUTES)}"
            )
        if text and not (is_plain and (not parts.path or PATH_PREFIX.fullmatch(parts.path))):
            raise ValueError(
                "is not an address; accepted: such as https://images.example.org "
                "or https://example.org/images"
            )
        return text


class WebhookSettings(Settings, OutboundSettings, PublicSettings):
    """Hold what the webhooks role needs to deliver them."""


class GatewaySettings(StoreSettings, OutboundSettings, StreamSettings, PublicSettings):
    """Hold the gateway's settings."""

    # HMAC key of the stored API keys; changing it revokes all of them
    api_key_pepper: SecretStr = Field(min_length=16)
    max_body_bytes: int = Field(262_144, ge=1024)
    max_batch_bytes: int = Field(4_194_304, ge=1024)  # of POST /v1/jobs:batch
    # of POST /v1/jobs, whose pictures may be data URLs
    max_job_body_bytes: int = Field(4_194_304, ge=1024)
    # of POST /v1/files, and of a picture fetched by URL
    max_upload_bytes: int = Field(33_554_432, ge=1024)
    # Time to fetch a picture by URL, from the first byte sent to the last one received.
    fetch_within_s: float = Field(10.0, gt=0)
    max_wait_s: int = Field(60, ge=0, le=60)  # Prefer: wait=N
    # The longest call of /v1/images; OpenAI's clients wait for 600 s
    images_wait_s: int = Field(300, ge=1, le=590)
    # The longest silence on an event stream: only a write detects that a client has gone.
    event_heartbeat_s: float = Field(10.0, gt=0)
    # Origins whose pages may call from a browser: "https://app.example.com, http://localhost:5173",
    # or *.
    cors_allowed_origins: str = ""
    # True only behind a proxy that sets or removes X-Forwarded-Prefix, -Host and -Proto itself.
    trust_forwarded_headers: bool = False
    # Images: 302 to the object store, or through the gateway.
    image_delivery: Literal["redirect", "proxy"] = "redirect"

    @field_validator("cors_allowed_origins")
    @classmethod
    def _are_origins(cls, text: str) -> str:
        origins = [part.strip() for part in text.split(",") if part.strip()]
        if origins != ["*"] and not all(_ORIGIN.fullmatch(origin) for origin in origins):
            raise ValueError(
                "is not a list of origins; accepted: such as https://pages.example.org, "
                "lower case, no path, or * alone"
            )
        return ",".join(origins)


class GatewayProcessSettings(GatewaySettings, ServerSettings):
    """Hold all settings of the gateway and of the gunicorn that runs it."""

    def hints(self) -> list[str]:
        """Describe settings that are allowed and probably not intended."""
        links_lead_to = self.s3_public_endpoint_url or self.s3_endpoint_url
        beyond = [place for place in self.published() if not is_loopback(place)]
        if links_lead_to and is_loopback(links_lead_to) and beyond:
            told = (
                f"links to images lead to {links_lead_to}, which is each client's own machine, "
                f"while {beyond[0]} is published"
            )
            cure = "set it to the object store's address as clients reach it"
            return [f"S3_PUBLIC_ENDPOINT_URL: {told}; {cure}"]
        return []


class MigrationSettings(Environment):
    """Hold the migration job's settings: the owner's login, and passwords of the login roles."""

    migration_database_url: PostgresUrl
    database_url: PostgresUrl
    auditor_database_url: PostgresUrl | None = None
    gateway_password: SecretStr | None = Field(None, min_length=1)
    worker_password: SecretStr | None = Field(None, min_length=1)
    results_password: SecretStr | None = Field(None, min_length=1)
    sweeper_password: SecretStr | None = Field(None, min_length=1)
    webhooks_password: SecretStr | None = Field(None, min_length=1)


class OperatorSettings(Environment):
    """Hold the settings of the command line in a container.

    These are the logins of the operator and the auditor, and the gateway's address.
    """

    database_url: PostgresUrl | None = None
    auditor_database_url: PostgresUrl | None = None
    api_key_pepper: SecretStr | None = Field(None, min_length=16)
    darkroom_url: HttpUrl | None = None
    darkroom_api_key: SecretStr | None = None


class DeploymentSettings(GatewayProcessSettings, FlowerSettings, MigrationSettings):
    """Hold every secret of a deployment.

    `darkroom check deployment` checks them before anything is started.
    """

    broker_password: SecretStr = Field(min_length=1)
    handoff_password: SecretStr = Field(min_length=1)
    flower_broker_password: SecretStr = Field(min_length=1)


AnySettings = TypeVar("AnySettings", bound=BaseSettings)


def read(kind: type[AnySettings], environment: Mapping[str, str] | None = None) -> AnySettings:
    """Read `environment`, by default the process's own, into `kind`. Raises SettingsInvalid."""
    token = _environment.set(environment)
    try:
        return kind()
    except ValidationError as error:
        problems = [line for problem in error.errors() for line in _told(kind, problem)]
        raise SettingsInvalid(problems) from None
    finally:
        _environment.reset(token)


def load(kind: type[AnySettings]) -> AnySettings:
    """Read the environment into `kind`.

    Ends the process with one line per variable that is missing or wrong.
    """
    try:
        return read(kind)
    except SettingsInvalid as error:
        refuse(f"settings: {problem}" for problem in error.problems)


def load_fleet_or_exit(settings: FleetSettings) -> Fleet:
    """Read fleet.toml for an entry point.

    Ends the process with one line per wrong key, and per setting that does not fit the fleet.
    """
    try:
        fleet = settings.load_fleet()
    except FleetInvalid as error:
        refuse(f"fleet.toml: {problem}" for problem in error.problems)
    refuse_misfits(settings, fleet)
    return fleet


def refuse_misfits(settings: FleetSettings, fleet: Fleet) -> None:
    """End the process, with one line per setting, if some do not fit the fleet."""
    if problems := misfits(settings, fleet):
        refuse(f"settings: {problem}" for problem in problems)


def misfits(settings: FleetSettings, fleet: Fleet) -> list[str]:
    """Describe settings that are valid by themselves and conflict with fleet.toml."""
    problems = []
    if isinstance(settings, WorkerSettings) and settings.worker_pool not in fleet.pools:
        problems.append(
            f"WORKER_POOL: is not a pool of fleet.toml; accepted: {', '.join(fleet.pools)}"
        )
    elif isinstance(settings, WorkerSettings):
        pool = fleet.pools[settings.worker_pool]
        if problem := class_problem(pool, settings.worker_class):
            accepted = ", ".join(pool.classes) or "none"
            problems.append(
                f"WORKER_CLASS: pool {settings.worker_pool!r}: {problem}; accepted: {accepted}"
            )
    if isinstance(settings, Settings):
        for name, tier in fleet.tiers.items():
            if settings.handoff_ttl_s < tier.run_within_s:
                least = f"tiers.{name}.run_within_s of fleet.toml ({tier.run_within_s:g})"
                problems.append(
                    f"HANDOFF_TTL_S: must not be less than {least}: "
                    "what a job left for its next try would be gone before"
                )
    return problems


def refuse(lines: Iterable[str]) -> NoReturn:
    """End the process because of its configuration."""
    for line in lines:
        print(line, file=sys.stderr)
    raise SystemExit(EX_CONFIG) from None


def unreadable(path: Path, error: OSError | UnicodeDecodeError) -> str:
    """Say why a file that an operator mounted cannot be read, and by which user."""
    if isinstance(error, UnicodeDecodeError):
        return f"{path} is not text in UTF-8"
    if isinstance(error, PermissionError):
        return (
            f"{path} cannot be read by uid {os.geteuid()} ({error.strerror}); "
            "make it readable for others (chmod o+r)"
        )
    if isinstance(error, IsADirectoryError):
        return (
            f"{path} is a folder; Docker makes one where the file of a mount is missing on the host"
        )
    return f"{path} cannot be read ({error.strerror})"


def is_loopback(place: str) -> bool:
    """Tell whether an address or URL leads to the machine itself.

    A port alone means every address of the machine, so it does not count as loopback.
    """
    if "://" in place:
        host = urlsplit(place).hostname or ""
    else:
        host = place.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _server(url: str) -> tuple[str | None, int, str]:
    parts = urlsplit(url)
    return parts.hostname, parts.port or 6379, parts.path.strip("/") or "0"


def _plain(value: object) -> str:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    return value if isinstance(value, str) else ""


def _told(kind: type[BaseSettings], problem: Any) -> Iterator[str]:
    """Yield the lines about one problem: what is wrong with a variable, and what is accepted.

    The value itself is never told.
    """
    error = problem.get("ctx", {}).get("error")
    if not problem["loc"]:  # of several variables together, which name themselves
        yield from str(error or problem["msg"]).splitlines()
        return
    name = str(problem["loc"][0])
    if isinstance(error, ValueError):
        yield f"{name.upper()}: {error}"
        return
    yield f"{name.upper()}: {_wrong(problem)}; accepted: {_accepted(kind.model_fields[name])}"


def _wrong(problem: Any) -> str:
    """Say in words what pydantic found."""
    if problem.get("ctx", {}).get("min_length") == 1:
        return "is empty"
    kind = problem["type"]
    return _WRONG.get(kind, "is not a number" if "parsing" in kind else "is out of range")


def _accepted(field: FieldInfo) -> str:
    """Say in words what a variable may be."""
    if field.description:
        return field.description
    for fact in field.metadata:
        if isinstance(fact, AfterValidator) and fact.func in _EXAMPLES:
            return _EXAMPLES[fact.func]
    bounds = _bounds(field)
    shortest = bounds.pop("min_length", None)
    if shortest is not None:
        return f"at least {shortest} characters" if shortest > 1 else "any text"
    given = getattr(field.annotation, "__args__", ())
    if choices := [choice for choice in given if isinstance(choice, str)]:
        return ", ".join(choices)
    if field.annotation not in _NUMBERS:
        return "true, false" if field.annotation is bool else "any text"
    words = {"gt": "above", "ge": "from", "le": "to"}
    told = (f"{words[name]} {bound}" for name, bound in bounds.items())
    return " ".join([_NUMBERS[field.annotation], *told])


def _bounds(field: FieldInfo) -> dict[str, Any]:
    return {
        name: getattr(fact, name)
        for fact in field.metadata
        for name in ("gt", "ge", "le", "min_length")
        if hasattr(fact, name)
    }


# By pydantic's type of problem.
_WRONG = {
    "missing": "is not set",
    "string_too_short": "is too short",
    "too_short": "is too short",
    "literal_error": "is unknown",
    "string_pattern_mismatch": "is unknown",
    "bool_parsing": "is neither true nor false",
}
_NUMBERS: dict[Any, str] = {int: "a whole number", float: "a number"}
_EXAMPLES: dict[Any, str] = {
    as_postgres_url: "postgresql://USER:PASSWORD@HOST:PORT/DATABASE",
    _redis_url: "redis://USER:PASSWORD@HOST:PORT/NUMBER",
    _http_url: "http://HOST:PORT or https://HOST:PORT",
    _listener: "HOST:PORT",
}
