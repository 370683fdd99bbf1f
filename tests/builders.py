"""What the tests of several rooms build.

A fleet file, jobs, what rendering and storing leave behind.
"""

import copy
import functools
import hashlib
import itertools
import json
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import redis
from numpy.typing import NDArray
from sqlalchemy import text
from sqlalchemy.orm import Session

from models import jobs, leases, tenants
from models.leases import Lease, LeftSnapshot, RenderedWork
from models.tables import Job, Tenant
from policy.catalog import resolve
from policy.fleet import Fleet, parse_fleet
from policy.params import NAMES, RequestedParams, Resolved
from policy.workers import WorkerTerms
from settings import AnySettings

GONE = object()  # as the value of a change: the key is not in the file at all
WORKER = "gpu0@here"
_numbers = itertools.count(1)

_FLEET: dict[str, Any] = {
    "currency": "EUR",
    "tiers": {
        "fast": {
            "rank": 0,
            "max_steps": 20,
            "default_steps": 4,
            "max_images": 4,
            "guaranteed_share": 0.25,
            "first_preview_s": 0.5,
            "final_s": 2.0,
            "determinism": "best_effort",
            "price_weight": 2.0,
            "start_within_s": 30,
        },
        "quality": {
            "rank": 1,
            "max_steps": 60,
            "default_steps": 20,
            "max_images": 8,
            "guaranteed_share": 0.15,
            "first_preview_s": 2.0,
            "final_s": 10.0,
            "determinism": "reproducible",
            "price_weight": 1.0,
            "start_within_s": 600,
        },
        "batch": {
            "rank": 2,
            "max_steps": 60,
            "default_steps": 20,
            "max_images": 8,
            "guaranteed_share": 0.05,
            "first_preview_s": 60.0,
            "final_s": 3600.0,
            "determinism": "best_effort",
            "price_weight": 0.5,
            "start_within_s": 86400,
        },
    },
    "models": {
        "pocket": {
            "title": "Pocket",
            "family": "sd",
            "licence": "Apache-2.0",
            "precision": "fp32",
            "sizes": ["128x128", "128x192"],
            "samplers": ["ddim", "euler"],
            "default_sampler": "ddim",
            "default_guidance": 4.0,
            "max_guidance": 15.0,
            "max_prompt_chars": 200,
            "created_at": datetime.fromisoformat("2026-11-21T00:00:00+00:00"),
            "tiers": {"quality": {"bucket_rows": {"128x128": 8, "128x192": 4}}},
            "versions": [{"id": "1", "source": "pocket/checkpoint"}],
        },
        "large": {
            "title": "Large",
            "family": "sd",
            "licence": "OpenRAIL",
            "precision": "fp16",
            "sizes": ["1024x1024"],
            "samplers": ["euler"],
            "default_sampler": "euler",
            "default_guidance": 7.0,
            "max_guidance": 20.0,
            "created_at": datetime.fromisoformat("2026-11-21T00:00:00+00:00"),
            "tiers": {
                "quality": {"bucket_rows": {"1024x1024": 4}},
                "fast": {"default_steps": 8, "default_guidance": 1.0},
            },
            "versions": [{"id": "1", "source": "large/1"}],
        },
    },
    "pools": {
        "local": {"models": ["pocket"], "slots": 16, "max_batch_rows": 16, "gpu_hour_price": 1.2},
        "big": {"models": ["large"], "slots": 8, "max_batch_rows": 8},
    },
}


def a_fleet(changes: Mapping[str, Any] | None = None) -> Fleet:
    """Three tiers, two models, two pools; `changes` by dotted key."""
    return parse_fleet(fleet_text(changes)) if changes else _plain_fleet()


def fleet_text(changes: Mapping[str, Any] | None = None) -> str:
    """The text of that fleet's file. A number in a dotted key is a place in a list."""
    tables = copy.deepcopy(_FLEET)
    for key, value in (changes or {}).items():
        *way, last = (int(part) if part.isdigit() else part for part in key.split("."))
        table: Any = tables
        for part in way:
            table = table[part] if isinstance(table, list) else table.setdefault(part, {})
        if value is GONE:
            del table[last]
        else:
            table[last] = value
    return "\n".join(f"{key} = {_toml(value)}" for key, value in tables.items())


def settings_for(kind: type[AnySettings], env: Mapping[str, str], **changes: Any) -> AnySettings:
    """What a role would be handed in the stack of `env`, with `changes`."""
    names = {
        name.lower(): value for name, value in env.items() if name.lower() in kind.model_fields
    }
    return kind(**{**names, **changes})


def a_closed_port() -> int:
    """A port of this machine on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def a_redis(folder: Path, **options: str) -> Iterator[str]:
    """The URL of a Redis of one's own with these options, such as `maxmemory="100mb"`."""
    port = a_closed_port()
    url = f"redis://127.0.0.1:{port}/0"
    binary = str(Path(sys.executable).with_name("redis-server"))
    command = [
        binary,
        "--bind",
        "127.0.0.1",
        "--port",
        str(port),
        "--dir",
        str(folder),
        "--save",
        "",
    ]
    for name, value in options.items():
        command += [f"--{name}", value]

    def answers() -> bool:
        try:
            return bool(redis.Redis.from_url(url).ping())
        except redis.RedisError:
            return False

    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        until(answers, what="redis-server")
        yield url
    finally:
        process.kill()
        process.wait()


def until(happens: Callable[[], Any], *, within_s: float = 60.0, what: str = "it") -> Any:
    """What `happens()` returns once it is true; asked every few milliseconds."""
    deadline = time.monotonic() + within_s
    while not (answer := happens()):
        assert time.monotonic() < deadline, f"{what} did not happen within {within_s} s"
        time.sleep(0.02)
    return answer


def a_zone_of_another_day() -> str:
    """A time zone where it is another day than in UTC, now and for an hour at least."""
    return "Pacific/Kiritimati" if datetime.now(UTC).hour >= 10 else "Pacific/Niue"


def some_params(**fields: Any) -> RequestedParams:
    return RequestedParams(**{"prompt": "a red circle", **fields})


def resolved(fleet: Fleet | None = None, **fields: Any) -> Resolved:
    """What becomes of `some_params(**fields)`."""
    return resolve(fleet or a_fleet(), some_params(**fields), default_seed=7)


def a_tenant(session: Session, *, weight: float = 1.0) -> Tenant:
    return tenants.create(
        session,
        name=f"tenant-{next(_numbers)}-{uuid.uuid4().hex[:8]}",
        weight=weight,
        actor="tests",
    )


def a_job(
    session: Session,
    *,
    tenant: Tenant | None = None,
    start_within_s: float = 600,
    run_within_s: float | None = None,
    predicted_s: float = 0.0,
    eta_raw_s: float | None = None,
    release_tag: float | None = None,
    tenant_metadata: Mapping[str, str] | None = None,
    **params: Any,
) -> Job:
    """An accepted job, of a tenant of its own unless one is given."""
    columns = dict.fromkeys(NAMES) | {
        "prompt": "a red circle",
        "negative_prompt": "",
        "pool": "local",
        "tier": "fast",
        "model": "pocket",
        "model_version": "1",
        "width_px": 128,
        "height_px": 128,
        "num_steps": 4,
        "guidance": 4.0,
        "sampler": "ddim",
        "seed": 7,
        "num_images": 1,
        "output_format": "png",
        "precision": "fp32",
        "determinism": "best_effort",
    }
    new_job = jobs.NewJob(
        params=Resolved(**columns | params),
        start_within_s=start_within_s,
        run_within_s=run_within_s,
        predicted_s=predicted_s,
        eta_raw_s=eta_raw_s,
        tenant_metadata=tenant_metadata,
    )
    owner = tenant or a_tenant(session)
    job = jobs.accept(
        session, new_job, tenant_id=owner.id, api_key_id=None, currency="EUR", actor="tests"
    )
    if release_tag is not None:
        job.release_tag = release_tag
        session.flush()
    return job


def a_lease(
    session: Session,
    job: Job | None = None,
    *,
    worker: str = WORKER,
    ttl_s: float = 15,
    terms: WorkerTerms | None = None,
    **params: Any,
) -> Lease:
    """A lease on `job`, or on a new one with `params`.

    A negative `ttl_s` makes one that has run out.
    """
    job = job or a_job(session, **params)
    lease = leases.take(session, job.id, worker=worker, device="cpu", ttl_s=ttl_s, terms=terms)
    assert lease is not None
    return lease


def hand_off(
    session: Session, lease: Lease, index: int = 0, *, store_within_s: float = 10, **record: Any
) -> Job:
    """Note that image `index` was rendered; `record` says what that took."""
    return leases.hand_off(
        session, lease, index, rendered=rendered(**record), store_within_s=store_within_s
    )


def preempt(
    session: Session,
    lease: Lease,
    *,
    left: Sequence[LeftSnapshot] = (),
    reason: str = "spot",
    kept_in: str = "handoff",
) -> Job:
    """Give the job up because its worker has to go."""
    return leases.preempt(session, lease, reason=reason, left=left, store=kept_in)


def a_left(
    index: int = 0, *, steps_done: int = 2, size_bytes: int = 100, device_seconds: float = 0.25
) -> LeftSnapshot:
    """What a preempted attempt leaves of an image."""
    return LeftSnapshot(index, steps_done, f"handoff:snapshot#{index}", size_bytes, device_seconds)


def store(
    session: Session,
    job: Job,
    index: int = 0,
    *,
    attempt: int = 1,
    artifact: dict[str, Any] | None = None,
) -> Job | None:
    """Record image `index` as uploaded."""
    return jobs.store(
        session,
        job_id=job.id,
        index=index,
        attempt=attempt,
        artifact=artifact or an_artifact(),
        fleet=a_fleet(),
        store_within_s=10,
        actor="results",
    )


def a_succeeded_job(session: Session, **params: Any) -> Job:
    lease = a_lease(session, **params)
    for index in lease.pending:
        hand_off(session, lease, index)
        store(session, lease.job, index)
    return lease.job


def rendered(**record: Any) -> RenderedWork:
    """What one image took: four steps, alone, half a second."""
    plain = {
        "num_steps": 4,
        "steps": 4,
        "shared_steps": 0,
        "max_rows": 2,
        "max_images": 1,
        "mean_rows": 2.0,
        "bucket_rows": None,
        "device_seconds": 0.5,
        "encode_s": 0.1,
        "denoise_s": 0.3,
        "decode_s": 0.1,
        "padding_s": 0.0,
        "waited_s": 0.0,
        "fingerprint": "cpu-fp32",
        "fingerprint_facts": {"torch_threads": 1},
    }
    return RenderedWork(**{**plain, **record})


def an_artifact() -> dict[str, Any]:
    digest = hashlib.sha256(uuid.uuid4().bytes).hexdigest()
    return {
        "object_key": f"t/x/sha256/{digest[:2]}/{digest}.png",
        "content_type": "image/png",
        "size_bytes": 1000,
        "width_px": 128,
        "height_px": 128,
        "pixels_sha256": digest,
        "content_sha256": digest,
    }


def some_pixels(width_px: int = 24, height_px: int = 16, seed: int = 0) -> NDArray[np.uint8]:
    """RGB noise, uint8 [h, w, 3], the same for the same seed."""
    return np.random.default_rng(seed).integers(0, 256, (height_px, width_px, 3), dtype=np.uint8)


@functools.cache
def _plain_fleet() -> Fleet:
    return parse_fleet(fleet_text())


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return (
            "{ "
            + ", ".join(f"{json.dumps(key)} = {_toml(item)}" for key, item in value.items())
            + " }"
        )
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, float):
        return repr(value)  # inf and nan are TOML too
    return json.dumps(value)


def spend(session: Session, tenant: Tenant, *, budget: float, cost: float) -> None:
    """Give the tenant a monthly budget, and add a cost to the ledger of today."""
    tenants.limit(session, tenant, changes={"monthly_budget": budget}, actor="tests")
    statement = """
        INSERT INTO usage_ledger (tenant_id, day, cost)
        VALUES (:id, (clock_timestamp() AT TIME ZONE 'UTC')::date, :cost)
        ON CONFLICT (tenant_id, day) DO UPDATE SET cost = usage_ledger.cost + excluded.cost
    """
    values = {"id": tenant.id, "cost": cost}
    session.execute(text(statement), values)
