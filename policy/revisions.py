"""Compare two revisions of the fleet, and decide what becomes of the jobs between them."""

from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Any, NamedTuple

from policy.failures import FailureCode
from policy.fleet import Fleet, Model, checkpoint_name, parse_size, toml_key
from policy.routing import Asker, LivePool, choose_pool, pools_for


class Fate(StrEnum):
    """What becomes of a queued job whose parts of the fleet may be gone."""

    STAYS = "stays"
    MOVES = "moves"  # to the pool that serves its model now
    FAILS = "fails"  # nobody can render it any more


class QueuedKind(NamedTuple):
    """What of a queued job the fleet may lose."""

    pool: str
    model: str
    model_version: str
    tier: str
    tenant: str
    width_px: int
    height_px: int
    sampler: str
    adapters: tuple[str, ...] = ()  # by name


class Decision(NamedTuple):
    """What becomes of a queued job.

    pool: in which it is then.  code, detail: why it fails, if it does.
    """

    fate: Fate
    pool: str
    code: FailureCode | None = None
    detail: str = ""


class Change(NamedTuple):
    """One difference; `old` or `new` is None where the key or the table is on one side alone."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        if self.old is None:
            return f"+ {self.key}" if self.new is TABLE else f"+ {self.key} = {self.new!r}"
        if self.new is None:
            return f"- {self.key}" if self.old is TABLE else f"- {self.key} = {self.old!r}"
        return f"  {self.key}: {self.old!r} -> {self.new!r}"


TABLE = object()  # stands for a whole table that is on one side alone


def changes(old: Fleet, new: Fleet) -> list[Change]:
    """List what differs, by key; a table that is added or removed is one change."""
    return list(_changes("", old.model_dump(mode="json"), new.model_dump(mode="json")))


def decide(job: QueuedKind, fleet: Fleet) -> Decision:
    """Decide what becomes of a queued job under this fleet.

    A job is complete when it is accepted, so its tier may be gone: the last tier in rank serves it
    (Fleet.queue_tier). It needs the weights of its version in its pool, or in another one that is
    open to its tenant, and of its model the size, the sampler and the adapters that it names.
    """
    decided, pool = _by_weights(job, fleet)
    if decided is Fate.FAILS:
        detail = f"model {job.model}, version {job.model_version}, is no longer offered"
        return Decision(decided, pool, FailureCode.MODEL_GONE, detail)
    lost = _lost_of(fleet.models[job.model], job)
    if lost is not None:
        detail = f"{lost} of model {job.model} is no longer offered"
        return Decision(Fate.FAILS, job.pool, FailureCode.NO_LONGER_OFFERED, detail)
    return Decision(decided, pool)


def decide_again(job: QueuedKind, fleet: Fleet, live: Callable[[str], LivePool]) -> Decision:
    """Decide for which pool such a job is accepted again, or why it is not.

    live: looks at what the workers of a pool serve; the pool is chosen as for a new request.
    """
    decision = decide(job, fleet)
    able = _able_pools(job, fleet)
    if decision.code is not None or not able:
        return decision
    checkpoint = checkpoint_name(job.model, job.model_version)
    asker = Asker(tenant=job.tenant, live=live)
    return decision._replace(pool=choose_pool(fleet, able, checkpoint, asker))


def _able_pools(job: QueuedKind, fleet: Fleet) -> tuple[str, ...]:
    return pools_for(
        fleet,
        model=job.model,
        version=job.model_version,
        tier=fleet.queue_tier(job.tier),
        tenant=job.tenant,
    )


def _by_weights(job: QueuedKind, fleet: Fleet) -> tuple[Fate, str]:
    able = _able_pools(job, fleet)
    if job.pool in able:
        return Fate.STAYS, job.pool
    if able:
        return Fate.MOVES, able[0]
    # A pool that was reserved for others meanwhile still makes what it was given.
    version = (job.model, job.model_version)
    has_weights = job.pool in fleet.pools and version in fleet.versions_in(job.pool)
    return (Fate.STAYS if has_weights else Fate.FAILS), job.pool


def _lost_of(model: Model, job: QueuedKind) -> str | None:
    """Name the first part of the job that its model does not offer; None if it offers all."""
    if (job.width_px, job.height_px) not in map(parse_size, model.sizes):
        return f"size {job.width_px}x{job.height_px}"
    if job.sampler not in model.samplers:
        return f"sampler {job.sampler}"
    lost = [name for name in job.adapters if name not in model.adapters]
    return f"adapter {lost[0]}" if lost else None


def _changes(place: str, old: Any, new: Any) -> Iterator[Change]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(name for name in new if name not in old)]:
            key = f"{place}.{toml_key(name)}" if place else toml_key(name)
            yield from _changes(key, old.get(name), new.get(name))
    elif _is_of_versions(old) and _is_of_versions(new):
        by_id = [{version["id"]: version for version in versions} for versions in (old, new)]
        yield from _changes(place, *by_id)
    elif old != new:
        yield Change(place, _told(old), _told(new))


def _is_of_versions(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _told(value: Any) -> Any:
    return TABLE if isinstance(value, dict) else value
