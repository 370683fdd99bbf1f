"""The gate of a worker under arbitrary arrivals.

Messages of any size, leases that come late or never, images that end in any order.

The worker here is the real one's rule on plain values: `may_take` asked queue by queue in the order
of `render_queues`, with the images of leases and of messages that have no lease yet.
"""

from collections import Counter, deque
from dataclasses import dataclass, field

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from policy import queues
from policy.fleet import Fleet
from policy.tiers import guaranteed_slots, may_take, most_jobs, own_slots
from tests.builders import a_fleet

TIERS = ("fast", "quality", "batch")


def most_images(fleet: Fleet, slots: int) -> int:
    """What a worker may hold at most.

    That many jobs, and what sticks out of each tier's last one.
    """
    largest = [tier.max_images for tier in fleet.tiers.values()]
    return most_jobs(fleet, slots) + sum(images - 1 for images in largest) + max(largest) - 1


@dataclass(eq=False)
class HeldJob:
    """A job in the worker's hand: its message says `images`, its lease, once it is there, how many
    of them are to be rendered.
    """

    tier: str
    is_front: bool
    images: int
    has_lease: bool = False


@dataclass
class Worker:
    """What a worker has of its queues, one message a turn, as the gate lets it."""

    fleet: Fleet
    slots: int
    queued: dict[str, deque[int]] = field(default_factory=dict)
    jobs: list[HeldJob] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.queued = {name: deque() for name in queues.render_queues(self.fleet, "local")}

    def held(self) -> Counter[str]:
        counts: Counter[str] = Counter()
        for job in self.jobs:
            counts[job.tier] += job.images
        return counts

    def open_queues(self) -> list[str]:
        """Those that the next question to the broker names."""
        held = self.held()

        def is_open(name: str) -> bool:
            tier, is_front = queues.tier_of(name)
            return may_take(self.fleet, tier, held, self.slots, is_front=is_front)

        return [name for name in self.queued if is_open(name)]

    def take(self) -> HeldJob | None:
        """One message at most comes of a question."""
        for name in self.open_queues():
            if self.queued[name]:
                tier, is_front = queues.tier_of(name)
                self.jobs.append(HeldJob(tier, is_front, self.queued[name].popleft()))
                return self.jobs[-1]
        return None


class Gate(RuleBasedStateMachine):
    """Anything may happen at any time, in any order."""

    @initialize(
        slots=st.sampled_from((1, 2, 3, 8, 16, 24)),
        shares=st.sampled_from(((0.25, 0.15, 0.05), (0.5, 0.3, 0.1), (0.0, 0.0, 0.0))),
    )
    def start(self, slots: int, shares: tuple[float, float, float]) -> None:
        changes = {
            f"tiers.{tier}.guaranteed_share": share
            for tier, share in zip(TIERS, shares, strict=True)
        }
        self.worker = Worker(a_fleet(changes), slots)

    @rule(
        tier=st.sampled_from(TIERS),
        is_front=st.booleans(),
        sizes=st.lists(st.integers(1, 8), min_size=1, max_size=12),
    )
    def arrive(self, tier: str, is_front: bool, sizes: list[int]) -> None:
        """A burst."""
        largest = self.worker.fleet.tiers[tier].max_images
        name = queues.render_queue("local", tier, is_front=is_front)
        self.worker.queued[name].extend(min(size, largest) for size in sizes)

    @rule(turns=st.integers(1, 40))
    def take(self, turns: int) -> None:
        """The worker asks; no lease comes meanwhile."""
        for _ in range(turns):
            before = self.worker.held()
            job = self.worker.take()
            if job is None:
                return
            self._check_taken(job, before)

    def _check_taken(self, job: HeldJob, before: Counter[str]) -> None:
        fleet, slots = self.worker.fleet, self.worker.slots
        rank = fleet.tiers[job.tier].rank
        upto = sum(images for tier, images in before.items() if fleet.tiers[tier].rank <= rank)
        has_room = before[job.tier] < guaranteed_slots(fleet, job.tier, slots) or upto < own_slots(
            fleet, job.tier, slots
        )
        assert has_room or (job.is_front and before.total() < 2 * slots)

    @precondition(lambda self: any(not job.has_lease for job in self.worker.jobs))
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        """A lease comes, for all of a job's images or what is left of them, or is refused."""
        job = data.draw(st.sampled_from([job for job in self.worker.jobs if not job.has_lease]))
        job.has_lease, job.images = True, data.draw(st.integers(0, job.images))
        if not job.images:
            self.worker.jobs.remove(job)

    @precondition(lambda self: any(job.has_lease for job in self.worker.jobs))
    @rule(data=st.data(), is_lost=st.booleans())
    def end(self, data: st.DataObject, is_lost: bool) -> None:
        """An image is handed on; or all of a job's are gone: canceled, lost, failed."""
        job = data.draw(st.sampled_from([job for job in self.worker.jobs if job.has_lease]))
        job.images = 0 if is_lost else job.images - 1
        if not job.images:
            self.worker.jobs.remove(job)

    @rule()
    def restart(self) -> None:
        """All that was in hand comes back at the front, at once, to a worker that holds nothing."""
        for job in self.worker.jobs:
            self.worker.queued[queues.render_queue("local", job.tier, is_front=True)].append(
                job.images
            )
        self.worker.jobs.clear()

    @invariant()
    def no_more_is_held_than_the_guarantees_allow(self) -> None:
        if not hasattr(self, "worker"):
            return
        fleet, slots = self.worker.fleet, self.worker.slots
        assert len(self.worker.jobs) <= most_jobs(fleet, slots)
        assert self.worker.held().total() <= most_images(fleet, slots)

    @invariant()
    def a_tier_within_its_guarantee_gets_in(self) -> None:
        if not hasattr(self, "worker"):
            return
        held, open_queues = self.worker.held(), self.worker.open_queues()
        for tier in TIERS:
            if held[tier] < guaranteed_slots(self.worker.fleet, tier, self.worker.slots):
                assert {
                    queues.render_queue("local", tier, is_front=is_front)
                    for is_front in (True, False)
                } <= set(open_queues)

    @invariant()
    def the_best_tier_has_every_slot(self) -> None:
        if hasattr(self, "worker") and self.worker.held()["fast"] < self.worker.slots:
            assert "local.fast" in self.worker.open_queues()

    def teardown(self) -> None:
        """Nobody starves: once images end as they come, everything is taken, whatever the order in
        which it arrived.
        """
        if not hasattr(self, "worker"):
            return
        rest = sum(map(len, self.worker.queued.values())) + len(self.worker.jobs)
        for _ in range(rest):
            while self.worker.take() is not None:
                pass
            if not self.worker.jobs:
                break
            self.worker.jobs.pop(0)
        assert not any(self.worker.queued.values())


TestGate = Gate.TestCase
