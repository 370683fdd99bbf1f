"""Decide which checkpoints are in a worker's device memory, and which one gives way. Pure.

A pool holds all of its checkpoints, or those that fit a budget: then one that is asked for takes
the place of the least recently used that nobody needs. One that is needed keeps its place for at
least as long as its load took, and gives way when somebody has waited for another long enough.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from policy.fleet import Fleet, Pool, checkpoint_name

GB = 10**9
# Of a GPU's memory, where fleet.toml names no budget; the rest is for images.
WEIGHTS_SHARE = 0.7
# Times that a worker leaves a job to another one that has its model loaded and slots free.
LEFT_TO_HOLDERS = 4


@dataclass(frozen=True)
class ResidencyRule:
    """The room for the checkpoints of a worker.

    device_bytes: for weights on the device; None: all of them are to be there.  patience_s: that a
    job waits for a checkpoint before one that is needed gives way.
    """

    device_bytes: int | None = None
    patience_s: float = 10.0


ALL = ResidencyRule()


@dataclass(frozen=True, kw_only=True)
class Resident:
    """A checkpoint in device memory. Instants are of one monotonic clock.

    load_s: that its load took.  used_at: when a job last asked for it.  jobs: that need it now.
    """

    name: str
    size_bytes: int
    loaded_at: float
    load_s: float
    used_at: float
    jobs: int


@dataclass(frozen=True)
class Awaited:
    """A checkpoint that is not in device memory. since: when the first of its jobs asked for it."""

    name: str
    size_bytes: int
    since: float


@dataclass(frozen=True)
class Swap:
    """A checkpoint to load, once others are gone.

    evicted: they take no more jobs, and leave when those that they have are done.
    """

    loaded: str
    evicted: tuple[str, ...] = ()


def rule_of(pool: Pool, *, gpu_bytes: int) -> ResidencyRule:
    """Make the rule of a worker of this pool.

    gpu_bytes: the memory of its GPU; 0 on a CPU, where the pool has to name its budget.
    """
    if pool.residency == "all":
        return ALL
    device_bytes = gpu_bytes * WEIGHTS_SHARE
    if pool.device_memory_gb is not None:
        device_bytes = pool.device_memory_gb * GB
    return ResidencyRule(int(device_bytes), pool.swap_after_s)


def problems_on_a_cpu(name: str, pool: Pool) -> list[str]:
    """Tell what a worker of this pool cannot do whose device is a CPU.

    Its memory is the host's, and it has no choice of sums.
    """
    problems = []
    if pool.residency == "lru" and pool.device_memory_gb is None:
        problems.append(
            f"pools.{name}.device_memory_gb: must be given where the device is a CPU, for its"
            " memory is shared with everything else on the machine"
        )
    if pool.host_memory_gb:
        problems.append(
            f"pools.{name}.host_memory_gb: must be 0 where the device is a CPU, for its memory is"
            " the host's: give it to device_memory_gb"
        )
    if pool.fp16_accumulation:
        problems.append(
            f"pools.{name}.fp16_accumulation: must be false where the device is a CPU, which sums"
            " in single precision"
        )
    return problems


def too_large(name: str, pool: Pool, sizes: Mapping[str, int]) -> list[str]:
    """Tell which checkpoints the pool's budget does not hold even alone. sizes: those known."""
    if pool.device_memory_gb is None:
        return []
    budget = f"pools.{name}.device_memory_gb: {pool.device_memory_gb:g}"
    return [
        f"{budget} is less than the {size_bytes / GB:.3g} GB of the weights of {checkpoint}"
        for checkpoint, size_bytes in sizes.items()
        if size_bytes > pool.device_memory_gb * GB
    ]


def drawn_first(fleet: Fleet, pool: str) -> tuple[str, ...]:
    """List the checkpoints of a pool that jobs come to unasked, those with most traffic in front.

    All but the versions of weight 0 that no tier chooses, or all of a pool that has only such: it
    is there for them. Of one weight, in the file's order.
    """
    weights: dict[str, float] = {}
    for name, version in fleet.versions_in(pool):
        model = fleet.models[name]
        is_chosen = any(own.version == version for own in model.tiers.values())
        weight = max(model.version(version).traffic_weight, 1.0 if is_chosen else 0.0)
        if weight:
            weights[checkpoint_name(name, version)] = weight
    if not weights:
        return tuple(checkpoint_name(*each) for each in fleet.versions_in(pool))
    return tuple(sorted(weights, key=lambda name: -weights[name]))


def that_fit(
    wanted: Iterable[str], sizes: Mapping[str, int], *, taken_bytes: int, rule: ResidencyRule
) -> tuple[str, ...]:
    """List those of the checkpoints, in their order, that fit beside what takes room already."""
    fitting = []
    for name in wanted:
        if rule.device_bytes is None or taken_bytes + sizes.get(name, 0) <= rule.device_bytes:
            fitting.append(name)
            taken_bytes += sizes.get(name, 0)
    return tuple(fitting)


def next_swap(
    residents: Collection[Resident],
    awaited: Sequence[Awaited],
    rule: ResidencyRule,
    *,
    now: float,
) -> Swap | None:
    """Choose the checkpoint that is loaded next, and those that make room; None: nothing can yet.

    Who has waited longest comes first. Another one may go before it, but not once its patience is
    over: then every place that becomes free is its own.
    """
    for each in sorted(awaited, key=lambda one: one.since):
        is_overdue = now - each.since >= rule.patience_s
        evicted = _evicted_for(each, residents, rule, now=now, is_overdue=is_overdue)
        if evicted is not None:
            return Swap(each.name, evicted)
        if is_overdue:
            return None
    return None


def _evicted_for(
    awaited: Awaited,
    residents: Collection[Resident],
    rule: ResidencyRule,
    *,
    now: float,
    is_overdue: bool,
) -> tuple[str, ...] | None:
    """Name those that give way to a checkpoint; None if too few may."""
    if rule.device_bytes is None:
        return ()
    # Its adapters' slots may take it above the budget, which is known once it was loaded: then it
    # has the device to itself.
    needed_bytes = min(awaited.size_bytes, rule.device_bytes)
    excess_bytes = sum(one.size_bytes for one in residents) + needed_bytes - rule.device_bytes
    evicted = []
    for one in sorted(residents, key=lambda one: (one.jobs > 0, one.used_at)):
        if excess_bytes <= 0:
            break
        is_held_long_enough = now - one.loaded_at >= one.load_s
        if not one.jobs or (is_overdue and is_held_long_enough):
            evicted.append(one.name)
            excess_bytes -= one.size_bytes
    return tuple(evicted) if excess_bytes <= 0 else None
