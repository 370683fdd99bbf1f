"""What is done to the stack, when, to whom and for how long.

Decided by the seed, done by one thread, and undone.

kill       SIGKILL; supervisord starts the process again at once
terminate  SIGTERM, the same
restart    stopped in good order, away for some seconds, started
freeze     SIGSTOP, and SIGCONT some seconds later; a worker stands still past its lease, and goes
           on when another may hold it
cut        every connection of Darkroom to a service is closed under it
flush      a Redis forgets everything
notice     a worker is told that its machine goes, and is killed when the time is over
"""

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import redis
from sqlalchemy.exc import SQLAlchemyError

from benchmarks.lib.integrity.notices import announce, take_away
from benchmarks.lib.integrity.probe import StackProbe
from benchmarks.lib.progress import log_progress
from fleet.stack import StackError

WORKER = "worker"
_KINDS = {
    "kill": (WORKER, "results", "sweeper", "gateway", "broker", "handoff", "postgres", "s3"),
    "terminate": (WORKER,),
    "restart": ("broker", "handoff", "postgres", "s3"),
    "freeze": (WORKER, "broker", "s3"),
    "cut": ("broker", "handoff", "postgres"),
    "flush": ("broker", "handoff", "broker and handoff"),
    "notice": (WORKER,),
}
_FEW = (
    ("kill", WORKER),
    ("kill", "results"),
    ("flush", "broker and handoff"),
    ("cut", "postgres"),
    ("restart", "broker"),
)
_LASTS_S = {"restart": (1.0, 4.0), "freeze": (3.0, 8.0), "notice": (4.0, 8.0)}  # from, to
_OVERSLEPT_S = (2.0, 5.0)  # of a frozen worker, past its lease
_LOADS_IN_S = 12.0  # a worker that was started again
_QUIET_S = 2.0  # after the first job


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One of them, as planned. `for_s` is 0 where there is nothing to undo."""

    at_s: float
    kind: str
    target: str
    for_s: float = 0.0

    def __str__(self) -> str:
        lasting = f" for {self.for_s:.1f} s" if self.for_s else ""
        return f"{self.kind} {self.target}{lasting}"


@dataclass
class FaultDone:
    """One of them, as it went. `at`: when it was done. `trouble`: why it could not be."""

    fault: Fault
    at: datetime
    trouble: str = ""


def plan_faults(
    seed: int,
    *,
    window_s: float,
    every_s: float,
    workers: Sequence[str],
    lease_s: float,
    notices: bool,
    few: bool,
) -> list[Fault]:
    """Plan every kind at least once, in an order of the seed's, and again while the window lasts.

    few: a handful that a short window can hold.
    """
    rng = random.Random(f"faults {seed}")
    kinds = list(_FEW) if few else _all_kinds(notices)
    count = max(len(kinds), int((window_s - _QUIET_S) / every_s))
    order: list[tuple[str, str]] = []
    while len(order) < count:
        order += rng.sample(kinds, len(kinds))
    gap_s = (window_s - _QUIET_S) / count
    back_at: dict[str, float] = {}  # when each process may be next
    planned = []
    for number, (kind, target) in enumerate(order[:count]):
        at_s = _QUIET_S + gap_s * (number + rng.uniform(0.1, 0.7))
        for_s = rng.uniform(*_LASTS_S[kind]) if kind in _LASTS_S else 0.0
        if target == WORKER:
            if kind == "freeze":
                for_s = lease_s + rng.uniform(*_OVERSLEPT_S)
            there = [name for name in workers if back_at.get(name, 0) <= at_s]
            target = rng.choice(there or list(workers))
        parts = target.split(" and ")
        for name in parts:  # one that stands still would not even hear the next order
            at_s = max(at_s, back_at.get(name, 0))
        pause_s = _LOADS_IN_S if parts[0] in workers else gap_s / 4
        back_at |= dict.fromkeys(parts, at_s + for_s + pause_s)
        planned.append(Fault(at_s=round(at_s, 1), kind=kind, target=target, for_s=round(for_s, 1)))
    return sorted(planned, key=lambda fault: fault.at_s)


def _all_kinds(notices: bool) -> list[tuple[str, str]]:
    """Return every kind of fault with every target it has."""
    return [
        (kind, target)
        for kind, targets in _KINDS.items()
        for target in targets
        if notices or kind != "notice"
    ]


class FaultInjector:
    """Does what is planned from a thread of its own, and leaves the stack as it found it."""

    def __init__(self, probe: StackProbe, faults: Sequence[Fault]) -> None:
        self.done: list[FaultDone] = []
        self._probe = probe
        self._undo: list[tuple[float, str, Callable[[], None]]] = []
        self._faults = list(faults)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fault-injector", daemon=True)
        self._thread.start()

    def finish(self) -> list[FaultDone]:
        """Wait until everything is done and undone."""
        self._thread.join()
        return self.done

    def give_up(self) -> None:
        """Do nothing more; undo what is to be undone, at once."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        started_at = time.monotonic()
        for fault in self._faults:
            self._undo_until(started_at + fault.at_s)
            if self._stop.is_set():
                break
            self._do(fault)
        while self._undo and not self._stop.is_set():
            self._undo_until(max(at for at, _, _ in self._undo))
        for _, name, undo in list(self._undo):
            self._try(name, undo)

    def _undo_until(self, until: float) -> None:
        """Undo what is due before an instant; return then, or when it is given up."""
        while not self._stop.is_set():
            self._undo.sort(key=lambda entry: entry[0])
            next_at = min([until, *(at for at, _, _ in self._undo[:1])])
            if self._stop.wait(max(0.0, next_at - time.monotonic())):
                return
            if self._undo and self._undo[0][0] <= time.monotonic():
                _, name, undo = self._undo.pop(0)
                self._try(name, undo)
            elif time.monotonic() >= until:
                return

    def _try(self, name: str, act: Callable[[], None]) -> str:
        """Do something; return what went wrong."""
        try:
            act()
        except (StackError, OSError, SQLAlchemyError, redis.RedisError) as error:
            trouble = f"{type(error).__name__}: {error}".splitlines()[0]
            log_progress(f"{name}: {trouble}")
            return trouble
        return ""

    def _do(self, fault: Fault) -> None:
        log_progress(str(fault))
        done = FaultDone(fault, datetime.now(UTC))
        done.trouble = self._try(str(fault), lambda: getattr(self, f"_{fault.kind}")(fault))
        self.done.append(done)

    def _later(self, fault: Fault, name: str, undo: Callable[[], None]) -> None:
        self._undo.append((time.monotonic() + fault.for_s, name, undo))

    def _kill(self, fault: Fault) -> None:
        self._probe.stack.kill(fault.target)

    def _terminate(self, fault: Fault) -> None:
        self._probe.stack.kill(fault.target, signal.SIGTERM)

    def _restart(self, fault: Fault) -> None:
        self._later(fault, f"start {fault.target}", lambda: self._probe.stack.start(fault.target))
        self._probe.stack.stop(fault.target)

    def _freeze(self, fault: Fault) -> None:
        pid = self._probe.stack.pid(fault.target)
        if pid is None:
            raise StackError(f"{fault.target} does not run")

        def wake() -> None:
            if self._probe.stack.pid(fault.target) == pid:  # else it was killed meanwhile
                os.kill(pid, signal.SIGCONT)

        self._later(fault, f"wake {fault.target}", wake)
        os.kill(pid, signal.SIGSTOP)

    def _cut(self, fault: Fault) -> None:
        if fault.target == "postgres":
            others = "usename LIKE 'darkroom%' AND usename <> current_user"
            self._probe.sql(
                f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}"
            )
            return
        client = self._redis(fault.target)
        for kind in ("pubsub", "normal"):  # ours is spared
            client.client_kill_filter(_type=kind, skipme=True)

    def _flush(self, fault: Fault) -> None:
        for name in fault.target.split(" and "):
            self._redis(name).flushall()

    def _notice(self, fault: Fault) -> None:
        announce(self._probe, fault.target, fault.for_s)
        pid = self._probe.stack.pid(fault.target)
        ends_at = time.monotonic() + fault.for_s

        def watch() -> None:
            if time.monotonic() < ends_at and self._probe.stack.pid(fault.target) == pid:
                self._undo.append((time.monotonic() + 0.3, f"watch {fault.target}", watch))
            else:  # its time is over, or it left by itself and a new one starts
                take_away(self._probe, fault.target, pid)

        watch()

    def _redis(self, name: str) -> redis.Redis:
        return self._probe.broker if name == "broker" else self._probe.handoff
