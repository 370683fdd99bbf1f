"""Choose the version of a model that renders a job, and the pool of workers that it waits for.

Pure. Who asks, and what live workers serve, is handed in. The pools that may render a job are
those that have its version and its tier: first those that are reserved for its tenant, then those
that are reserved for nobody; of each, first those that name the tier. A job goes to the first one
that can render it now.
"""

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from policy.fleet import Fleet, ModelTier, ModelVersion, Pool, checkpoint_name


@dataclass(frozen=True)
class LivePool:
    """What the live workers of a pool serve.

    devices: workers that take jobs.  held: checkpoints that one of them serves at least; None: all
    of the pool.
    """

    devices: int
    held: Collection[str] | None = None

    def serves(self, checkpoint: str) -> bool:
        """Tell whether a live worker can render by this checkpoint."""
        return self.devices > 0 and (self.held is None or checkpoint in self.held)


def _everything_is_served(pool: str) -> LivePool:
    return LivePool(1)


@dataclass(frozen=True)
class Asker:
    """Who sends a request, as far as it decides on version and pool.

    tenant: its name.  models, tiers: that it may use; None: all.  may_name_versions: its key has
    the scope for it.  live: looks at a pool.
    """

    tenant: str = ""
    models: Collection[str] | None = None
    tiers: Collection[str] | None = None
    may_name_versions: bool = False
    live: Callable[[str], LivePool] = _everything_is_served

    def may_use_model(self, model: str) -> bool:
        """Tell whether the tenant's limits allow the model."""
        return self.models is None or model in self.models

    def may_use_tier(self, tier: str) -> bool:
        """Tell whether the tenant's limits allow the tier."""
        return self.tiers is None or tier in self.tiers


ANYBODY = Asker()


def pools_for(fleet: Fleet, *, model: str, version: str, tier: str, tenant: str) -> tuple[str, ...]:
    """List the pools that may render such a job, the first choice in front; () if none may."""
    able = [
        name
        for name, pool in fleet.pools.items()
        if (model, version) in fleet.versions_in(name) and _is_open(pool, tier, tenant)
    ]
    return tuple(sorted(able, key=lambda name: _distance(fleet.pools[name])))


def _is_open(pool: Pool, tier: str, tenant: str) -> bool:
    for_tenant = not pool.tenants or tenant in pool.tenants
    return for_tenant and (not pool.tiers or tier in pool.tiers)


def _distance(pool: Pool) -> tuple[bool, bool]:
    return not pool.tenants, not pool.tiers


def tiers_for(
    fleet: Fleet, *, model: str, tenant: str, version: str | None = None
) -> tuple[str, ...]:
    """List the tiers in which this tenant's jobs of the model can be rendered.

    version: that they name; None: none.
    """
    able = []
    for tier in fleet.tiers:
        served = versions_for(fleet, model, tier, tenant)
        if version is None:
            found = versions_unnamed(fleet, model, tier, served)
        else:
            found = tuple(each for each in served if each.id == version)
        if found:
            able.append(tier)
    return tuple(able)


def versions_for(fleet: Fleet, model: str, tier: str, tenant: str) -> tuple[ModelVersion, ...]:
    """List the versions of the model that some pool may render for this tenant in this tier."""
    return tuple(
        version
        for version in fleet.models[model].versions
        if pools_for(fleet, model=model, version=version.id, tier=tier, tenant=tenant)
    )


def versions_unnamed(
    fleet: Fleet, model: str, tier: str, served: Iterable[ModelVersion]
) -> tuple[ModelVersion, ...]:
    """List those of the versions of which one renders a job that names none.

    It is the tier's own, or one of those that have traffic.
    """
    own = fleet.models[model].tiers.get(tier, ModelTier()).version
    if own is not None:
        return tuple(version for version in served if version.id == own)
    return tuple(version for version in served if version.traffic_weight > 0)


def choose_pool(fleet: Fleet, pools: Iterable[str], checkpoint: str, asker: Asker = ANYBODY) -> str:
    """Choose the first of these pools that can render by the checkpoint soonest."""
    return min(pools, key=lambda pool: _delay(fleet.pools[pool], asker.live(pool), checkpoint))


def choose_version(
    fleet: Fleet, versions: Sequence[ModelVersion], *, model: str, tier: str, asker: Asker
) -> ModelVersion:
    """Draw one of the versions, of those that live workers serve if there are any.

    The only one may be without traffic: a tier's own.
    """
    if len(versions) > 1:
        delays = [_least_delay(fleet, model, version, tier, asker) for version in versions]
        soonest = min(delays)
        versions = [each for each, delay in zip(versions, delays, strict=True) if delay == soonest]
    if len(versions) == 1:
        return versions[0]
    return draw_version(versions, model=model, tenant=asker.tenant)


def _least_delay(fleet: Fleet, model: str, version: ModelVersion, tier: str, asker: Asker) -> int:
    pools = pools_for(fleet, model=model, version=version.id, tier=tier, tenant=asker.tenant)
    checkpoint = checkpoint_name(model, version.id)
    return min(_delay(fleet.pools[pool], asker.live(pool), checkpoint) for pool in pools)


def _delay(pool: Pool, live: LivePool, checkpoint: str) -> int:
    """Rank how soon a pool can render: now or once it is scaled up, after a repair, never."""
    if live.serves(checkpoint) or (pool.scalable and not live.devices):
        return 0
    return 1 if pool.warm_floor and not live.devices else 2


def draw_version(versions: Sequence[ModelVersion], *, model: str, tenant: str) -> ModelVersion:
    """Draw a version by weight: always the same one for a tenant while the weights stand.

    By weighted rendezvous hashing: if a version is taken away, only its own tenants move.
    """

    def distance(version: ModelVersion) -> float:
        drawn = hashlib.sha256(f"{tenant}\n{model}\n{version.id}".encode()).digest()
        share = (int.from_bytes(drawn[:8]) + 1) / 2**64
        return -math.log(share) / version.traffic_weight

    return min(versions, key=distance)


@dataclass(frozen=True)
class Overflow:
    """Where jobs of a pool and a tier go that waited too long.

    checkpoints: that the other pool has.  tenants: for whom it is reserved; (): for nobody.
    """

    pool: str
    after_s: float
    checkpoints: frozenset[str]
    tenants: tuple[str, ...]


def overflow(fleet: Fleet, *, pool: str, tier: str, live: LivePool) -> Overflow | None:
    """Say where jobs that wait too long for `pool` may go; None if nowhere.

    live: what the workers of the other pool serve.
    """
    shape = fleet.pools[pool]
    if shape.overflow_to is None or shape.overflow_after_s is None or not live.devices:
        return None
    other = fleet.pools[shape.overflow_to]
    if other.tiers and tier not in other.tiers:
        return None
    served = frozenset(
        checkpoint
        for checkpoint in fleet.checkpoints_in(shape.overflow_to)
        if live.serves(checkpoint)
    )
    return Overflow(shape.overflow_to, shape.overflow_after_s, served, other.tenants)
