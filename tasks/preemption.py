"""Empty a worker that has to leave: take nothing more, finish or give up its jobs, end.

A notice comes from a cloud, a file or SIGTERM (edges/notices.py). Jobs that will be done before its
time is over, less a margin, are finished. The others leave the engine at the next step boundary,
and another worker resumes them from that step.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from edges import telemetry
from edges.notices import Notice, NoticeSource, NoticeSourceUnavailable
from policy import gates
from tasks.keeper import LeaseKeeper

log = structlog.get_logger(__name__)

LOOK_EVERY_S = 0.1
ENDS_WITHIN_S = 15.0  # after the notice's time; supervisors wait for 25 s before SIGKILL


@dataclass(frozen=True)
class _End:
    reason: str
    at: float  # monotonic: by then everything must be given up
    noticed_at: float


class Preemption:
    """Empty the worker. `begin` may be called more than once: an earlier end wins.

    From the first call on the worker takes nothing more.
    """

    def __init__(
        self,
        keeper: LeaseKeeper,
        *,
        when_empty: Callable[[], None],
        end_within: Callable[[float], None],
    ) -> None:
        """Empty the worker of this keeper.

        when_empty: is called when it holds no job any more.  end_within: is told of the seconds
        after which the process may be ended, whatever hangs.
        """
        self._keeper = keeper
        self._when_empty = when_empty
        self._end_within = end_within
        self._end: _End | None = None
        self._lock = threading.Lock()

    def begin(self, notice: Notice) -> None:
        """Start to leave. Returns at once."""
        now = time.monotonic()
        give_up_at = now + gates.give_up_after_s(notice.within_s)
        end = _End(f"{notice.source}: {notice.detail}", give_up_at, now)
        with self._lock:
            is_first = self._end is None
            if self._end is None or end.at < self._end.at:
                self._end = end
        log.warning(
            "worker_leaves",
            source=notice.source,
            within_s=round(notice.within_s, 1),
            detail=notice.detail,
        )
        telemetry.NOTICES.labels(notice.source).inc()
        self._end_within(notice.within_s + ENDS_WITHIN_S)
        if is_first:
            self._keeper.take_no_more(end.reason)
            threading.Thread(target=self._run, name="preemption", daemon=True).start()

    def _run(self) -> None:
        while self._keeper.all_held():
            for held in self._keeper.all_held():
                assert self._end is not None
                left_s = self._end.at - time.monotonic()
                if not gates.will_finish(held.unrendered, held.expected_s(), left_s):
                    held.leave(self._end.reason)
            time.sleep(LOOK_EVERY_S)
        assert self._end is not None
        log.warning("worker_has_left", after_s=round(time.monotonic() - self._end.noticed_at, 2))
        self._when_empty()


def wait_while_a_notice_stands(sources: Sequence[NoticeSource]) -> None:
    """Return when no source has a notice.

    A worker that is started again before its machine goes must not take jobs.
    """
    was_told = False
    while any(_stands(source) for source in sources):
        if not was_told:
            log.warning("worker_waits_for_its_machine_to_go")
            was_told = True
        time.sleep(1)


def _stands(source: NoticeSource) -> bool:
    try:
        return source.poll() is not None
    except NoticeSourceUnavailable:
        return False  # the watch will tell
