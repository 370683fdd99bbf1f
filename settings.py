"""The environment, typed: the only module that reads it.

Every role asks for its own class and so holds no secret that it does not need: a GPU worker never sees an
S3 key, a results worker never sees the pepper of the API keys.

FleetSettings                fleet.toml
├── DeviceSettings           + the device that a worker is pinned to, and where its checkpoints lie (calibration)
└── BrokerSettings           + the broker
    ├── FlowerSettings       + the user and password that Flower asks for
    └── Settings             + Postgres and the hand-off (sweeper)
        ├── WorkerSettings   + those of the device
        ├── CourierSettings  + the private networks it may reach (webhooks)
        └── StoreSettings    + the object store (results worker)
            └── GatewaySettings  + the API key pepper and the limits of the door
StreamSettings               how many threads a gateway process has, and what for (and the gateway's)
└── ServerSettings           + how gunicorn listens
OutboundSettings             which private networks webhooks and pictures by URL may reach (gateway, courier)
ServerSettings               how gunicorn listens
"""

import ipaddress
import sys
from pathlib import Path
from typing import Self, TypeVar

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from policy.fleet import Fleet, FleetInvalid, parse_fleet

REPO = Path(__file__).resolve().parent
SMALL_BODY_BYTES = 65_536  # of a request: is read by gunicorn's loop before a thread is taken


class FleetSettings(BaseSettings):
    """What everybody is handed. Names of variables are the field names in capitals."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore")

    fleet_file: Path = REPO / "fleet.toml"
    log_level: str = "INFO"

    def load_fleet(self) -> Fleet:
        """Read and validate fleet.toml; raises FleetInvalid, which names the key of every offending line."""
        try:
            text = self.fleet_file.read_text()
        except OSError as error:
            raise FleetInvalid([f"{self.fleet_file}: cannot be read ({error.strerror})"]) from None
        return parse_fleet(text)


class DeviceSettings(FleetSettings):
    """What an engine is started with."""

    device: str = "auto"  # cpu, cuda:0, or auto: the first visible GPU, else the CPU
    torch_threads: int = Field(1, ge=1)  # part of the fingerprint; 1 on a shared CPU machine
    checkpoint_root: Path = REPO  # where relative paths of fleet.toml start
    curves_folder: Path | None = None  # what `darkroom calibrate` measured; None: every start measures for itself


class BrokerSettings(FleetSettings):
    """What whoever knows the queues is handed."""

    broker_url: str  # Redis of Celery's queues; noeviction, holds ids only


class FlowerSettings(BrokerSettings):
    """What Flower is handed; it asks for this user and password."""

    flower_user: str = "operator"
    flower_password: SecretStr = Field(min_length=8)
    flower_bind: str = "127.0.0.1:5555"


class StreamSettings(BaseSettings):
    """What gunicorn and the gateway in it agree on."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore")

    gateway_max_streams: int = Field(512, ge=1)  # live event streams of one process; each holds a thread of its own
    gateway_threads: int = Field(128, ge=4)  # beside those of streams; a waiting client holds one, not a database connection
    gateway_max_waits: int | None = Field(None, ge=1)  # clients that wait for a job's end, of one process; None: half of the threads
    gateway_max_uploads: int | None = Field(None, ge=1)  # bodies over 64 KiB that come in at once; None: an eighth of the threads
    upload_spool_bytes: int | None = Field(None, ge=1)  # of uploads in the temporary folder; None: four fifths of what is free at start
    web_concurrency: int = Field(1, ge=1)  # processes

    @property
    def max_waits(self) -> int:
        """Waiting clients of one process."""
        return self.gateway_max_waits or self.gateway_threads // 2

    @property
    def max_uploads(self) -> int:
        """Large bodies that one process reads at once."""
        return self.gateway_max_uploads or max(1, self.gateway_threads // 8)

    @model_validator(mode="after")
    def _leaves_threads_to_others(self) -> Self:
        if self.max_waits + self.max_uploads >= self.gateway_threads:
            held = f"GATEWAY_MAX_WAITS and GATEWAY_MAX_UPLOADS hold {self.max_waits} and {self.max_uploads} threads"
            raise ValueError(f"{held}: GATEWAY_THREADS must be larger than both together, not {self.gateway_threads}")
        return self


class ServerSettings(StreamSettings):
    """How gunicorn listens, and how long it waits for a client."""

    gateway_bind: str = "127.0.0.1:8080"
    gateway_max_connections: int = Field(8192, ge=64)  # of one process; beyond, the one that was silent for longest makes room
    keepalive_s: int = Field(75, ge=1)  # longer than load balancers keep a connection (60 s), or they use one that we just closed
    header_timeout_s: float = Field(10.0, gt=0)  # for the head of a request
    body_timeout_s: float = Field(20.0, gt=0)  # for its body, and as much longer as gateway_min_bytes_per_s gives
    gateway_min_bytes_per_s: int = Field(32_768, ge=1)
    gateway_buffer_bytes: int = Field(134_217_728, ge=1_048_576)  # of all requests that have not come in whole; and of answers not gone out
    metrics_port: int = Field(0, ge=0, le=65535)
    metrics_host: str = "127.0.0.1"

    @model_validator(mode="after")
    def _has_connections_to_spare(self) -> Self:
        threads = self.gateway_threads + self.gateway_max_streams
        if self.gateway_max_connections <= threads:
            raise ValueError(f"GATEWAY_MAX_CONNECTIONS must be larger than GATEWAY_THREADS and GATEWAY_MAX_STREAMS together, {threads}")
        return self


class Settings(BrokerSettings):
    """What every process that moves jobs is handed."""

    database_url: str  # SQLAlchemy URL of the application role (INSERT only on the audit log)
    handoff_url: str  # another Redis: decoded pixels on their way to storage, progress, cancels

    lease_ttl_s: float = Field(15.0, gt=0)  # a worker renews every 5 s: three missed beats lose the lease
    lease_renew_s: float = Field(5.0, gt=0)
    lease_stop_s: float = Field(12.0, gt=0)  # no renewal for this long: the worker drops its own work
    sweep_every_s: float = Field(2.0, gt=0)
    max_attempts: int = Field(5, ge=1)  # lease losses and errors count, preemptions do not
    store_within_s: float = Field(10.0, gt=0)  # a storing job past this deadline is looked at by the sweeper
    handoff_ttl_s: int = Field(3600, ge=60)
    database_pool_size: int = Field(10, ge=1)
    metrics_port: int = Field(0, ge=0, le=65535)  # Prometheus text on metrics_host; 0 = none
    metrics_host: str = "127.0.0.1"


class WorkerSettings(Settings, DeviceSettings):
    """What a GPU worker is handed; its pool decides which models it holds."""

    worker_pool: str = "local"  # a pool of fleet.toml
    worker_name: str = ""  # gpuN@host; the launcher sets it
    preemption_notices: str = ""  # where a notice that the machine goes may appear: aws, gcp, azure, file:/PATH ({worker} = its name)
    engine_stuck_after_s: float = Field(300.0, gt=0)  # a turn of the engine that takes longer is a device that hangs: the worker ends
    shutdown_notice_s: float = Field(20.0, gt=0)  # what SIGTERM gives: less than whoever sends it waits before SIGKILL
    cuda_visible_devices: str | None = None  # the launcher starts a process for each of these; unset = all


class StoreSettings(Settings):
    """What is needed to reach the object store, any that speaks S3."""

    s3_bucket: str
    s3_access_key_id: SecretStr
    s3_secret_access_key: SecretStr
    s3_endpoint_url: str | None = None  # None = AWS
    s3_public_endpoint_url: str | None = None  # what clients can reach; presigned URLs carry it
    s3_region: str = "us-east-1"
    s3_checksums: str = Field("when_required", pattern="^(when_required|when_supported)$")  # older servers refuse CRC trailers
    presign_ttl_s: int = Field(600, ge=1, le=604_800)


class OutboundSettings(BaseSettings):
    """What whoever sends requests to addresses of the tenants' choice is handed."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore")

    outbound_allowed_networks: str = ""  # CIDRs, "10.2.0.0/16, 127.0.0.1/32": private ones that may be reached all the same

    @field_validator("outbound_allowed_networks")
    @classmethod
    def _are_networks(cls, text: str) -> str:
        for part in filter(None, (part.strip() for part in text.split(","))):
            ipaddress.ip_network(part)
        return text


class CourierSettings(Settings, OutboundSettings):
    """What delivers webhooks is handed."""


class GatewaySettings(StoreSettings, OutboundSettings, StreamSettings):
    """What the gateway is handed."""

    api_key_pepper: SecretStr = Field(min_length=16)  # HMAC key of the stored API keys; changing it revokes all of them
    max_body_bytes: int = Field(262_144, ge=1024)
    max_batch_bytes: int = Field(4_194_304, ge=1024)  # of POST /v1/jobs:batch
    max_job_body_bytes: int = Field(4_194_304, ge=1024)  # of POST /v1/jobs, whose pictures may be data URLs
    max_upload_bytes: int = Field(33_554_432, ge=1024)  # of POST /v1/files, and of a picture fetched by URL
    fetch_within_s: float = Field(10.0, gt=0)  # a picture by URL, from the first byte sent to the last one received
    max_wait_s: int = Field(60, ge=0, le=60)  # Prefer: wait=N
    images_wait_s: int = Field(300, ge=1, le=590)  # a call of /v1/images; OpenAI's clients wait for 600 s
    event_heartbeat_s: float = Field(10.0, gt=0)  # silence on an event stream; only a write finds out that a client has gone


AnySettings = TypeVar("AnySettings", bound=BaseSettings)


def load(kind: type[AnySettings]) -> AnySettings:
    """Read the environment into `kind`, or end the process with one line per variable that is missing or wrong."""
    try:
        return kind()
    except ValidationError as error:
        for problem in error.errors():
            name = "_".join(str(part) for part in problem["loc"]).upper()
            told = f"{name}: {problem['msg'].lower()}" if name else problem["msg"].removeprefix("Value error, ")
            print(f"settings: {told}", file=sys.stderr)
        raise SystemExit(78) from None  # EX_CONFIG


def load_fleet_or_exit(settings: FleetSettings) -> Fleet:
    """`settings.load_fleet()` for entry points: ends the process with one line per wrong key."""
    try:
        return settings.load_fleet()
    except FleetInvalid as error:
        for problem in error.problems:
            print(f"fleet.toml: {problem}", file=sys.stderr)
        raise SystemExit(78) from None
