"""Have a worker's engine go by a new revision of the fleet, while it renders.

Models that are new are loaded beside the images that run, those that are gone leave when their last
image has ended. What an engine is started with (slots, rows of a forward) cannot be changed while
it runs: then the worker starts anew. Of the workers of a pool one does so at a time; its images go
on at their step. What is kept elsewhere is fetched before any of that.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

import structlog
from sqlalchemy import Engine as Database
from sqlalchemy.exc import SQLAlchemyError

from edges.notices import Notice
from engine.config import CheckpointSpec, EngineConfig
from engine.engine import Engine
from engine.errors import EngineStopped
from models import workers
from models.database import run_transaction
from policy.current import UNNUMBERED, CurrentFleet
from policy.fleet import Fleet
from policy.residency import ResidencyRule, drawn_first, that_fit
from policy.workers import terms_of
from settings import WorkerSettings, misfits
from tasks import capabilities
from tasks.engines import (
    checkpoint_specs,
    device_misfits,
    engine_config,
    pool_of,
    residency_rule,
    sizes_of,
)
from tasks.keeper import LeaseKeeper
from tasks.residency import Residency
from tasks.weights import BackgroundStaging, Weights, wanted_of

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class DescribedEngine:
    """What the engine of a worker is under a fleet: its configuration and its checkpoints.

    drawn: those that jobs come to unasked, those with most traffic in front.
    """

    config: EngineConfig
    rule: ResidencyRule
    specs: Mapping[str, CheckpointSpec]
    drawn: tuple[str, ...]

    def lacking_files_of(self, absent: Mapping[str, str]) -> "DescribedEngine":
        """Return the same with the reason at each checkpoint whose files are not here."""
        specs = {
            name: replace(spec, absent=absent.get(name, "")) for name, spec in self.specs.items()
        }
        return replace(self, specs=specs)

    def first_loaded(self) -> list[CheckpointSpec]:
        """List the checkpoints that the engine starts with."""
        sizes = sizes_of(self.specs.values())
        names = that_fit(self.drawn, sizes, taken_bytes=0, rule=self.rule)
        return [spec for name, spec in self.specs.items() if name in names]


def described_engine(settings: WorkerSettings, fleet: Fleet) -> DescribedEngine | None:
    """Describe the engine of this worker under a fleet; None if the fleet lacks its pool."""
    if settings.worker_pool not in fleet.pools:
        return None
    pool = pool_of(settings, fleet)
    root, cache = settings.checkpoint_root, settings.model_cache_dir
    specs = checkpoint_specs(fleet, pool.models, root, cache)
    return DescribedEngine(
        config=engine_config(settings, fleet, pool, may_lack_checkpoints=True),
        rule=residency_rule(settings, pool),
        specs={spec.name: spec for spec in specs},
        drawn=drawn_first(fleet, settings.worker_pool),
    )


class EngineRevisions:
    """Take over one revision after another. Called by one thread."""

    def __init__(
        self,
        settings: WorkerSettings,
        current: CurrentFleet,
        engine: Engine,
        residency: Residency,
        keeper: LeaseKeeper,
        database: Database,
        weights: Weights,
        *,
        leave: Callable[[Notice], None],
    ) -> None:
        """Know the engine as it was started. leave: empties the worker and ends its process."""
        self._settings = settings
        self._current = current
        self._engine = engine
        self._residency = residency
        self._keeper = keeper
        self._database = database
        self._weights = weights
        self._staging = BackgroundStaging(weights)
        self._leave = leave
        self._has = described_engine(settings, current.fleet)

    def lacking(self) -> frozenset[str]:
        """Name the checkpoints that the pool offers and the engine does not serve now."""
        fleet = self._current.fleet
        pool = self._settings.worker_pool
        offered = fleet.checkpoints_in(pool) if pool in fleet.pools else frozenset()
        return offered - self._residency.serves

    def numbers(self) -> tuple[int, int]:
        """Return the revision that the engine goes by, and the newest that the worker knows of."""
        return self._keeper.revision or UNNUMBERED, self._current.number

    @property
    def is_behind(self) -> bool:
        """Tell whether the engine goes by an older revision than the worker knows of."""
        engine, known = self.numbers()
        return known > engine

    def is_unheard_of(self, number: int) -> bool:
        """Tell whether the worker is to follow this revision and does not know of it yet."""
        return self._settings.follow_revisions and number > self._current.number

    def is_to_fetch_again(self) -> bool:
        """Tell whether to go by the same fleet again, as weights that failed are due again."""
        return not self._keeper.leaving and self._staging.is_to_try_again()

    def go_by(self, new: Fleet) -> bool:
        """Have the engine go by a new fleet, or begin to leave.

        False: what it needs is being fetched, or it has to start anew and it is another worker's
        turn. Ask again.
        """
        wanted = described_engine(self._settings, new)
        absent = self._staging.stage(wanted_of(new, wanted.specs if wanted else ()))
        self._keeper.describe(facts={workers.DOING: self._staging.doing})
        if absent is None:
            return False
        if self._has is None or wanted is None or self._must_start_anew(self._has, wanted):
            return self._starts_anew(new)
        with suppress(EngineStopped):  # the worker ends; its successor reads the newest revision
            self._engine.set_rank_shares(wanted.config.rank_shares)
            self._residency.go_by(wanted.lacking_files_of(absent).specs, wanted.drawn)
            # Also where nothing changed here: workers of a revision before may have written since.
            worker = self._keeper.identity.name
            capabilities.publish(self._database, new, self._engine, worker=worker)
            self._has = wanted
            self._go_on_by_terms_of(new)
            self._tell_of_wait(None)
            self._keeper.revision = self._current.number
            self._weights.keep_only(wanted_of(new, wanted.specs))
            self._keeper.beat_soon()
        return True

    def _go_on_by_terms_of(self, fleet: Fleet) -> None:
        """Have the attempts from now on go by the price and the market that the fleet says."""
        pool = fleet.pools[self._settings.worker_pool]
        self._keeper.describe(terms=terms_of(pool, self._settings.worker_class))

    @staticmethod
    def _must_start_anew(has: DescribedEngine, wanted: DescribedEngine) -> bool:
        """Tell whether the change is more than models that come and go, and shares of tiers.

        A version that is another one now would be away in every worker of the pool at once.
        """
        both = has.specs.keys() & wanted.specs.keys()
        is_changed = any(has.specs[name] != wanted.specs[name] for name in both)
        same_shares = replace(wanted.config, rank_shares=has.config.rank_shares)
        return is_changed or (same_shares, wanted.rule) != (has.config, has.rule)

    def _starts_anew(self, new: Fleet) -> bool:
        if self._keeper.leaving:
            return True
        problems = misfits(self._settings, new) + device_misfits(self._settings, new)
        if problems and self._settings.worker_pool in new.pools:
            # The successor would end at once: this one goes on as it is.
            log.error("fleet_not_followed", number=self._current.number, problems=problems)
            return True
        if not self._may_leave():
            return False
        number = self._current.number
        self._keeper.returns_for = number
        within_s = self._settings.shutdown_notice_s
        self._leave(Notice("fleet", within_s, f"revision {number} is in force"))
        return True

    def _may_leave(self) -> bool:
        name, pool = self._keeper.identity.name, self._keeper.identity.pool
        try:
            other = run_transaction(
                self._database, lambda session: workers.leave_in_turn(session, name, pool)
            )
        except SQLAlchemyError as error:
            log.info("start_anew_postponed", reason=type(error).__name__)
            return False
        self._tell_of_wait(None if other is None else f"{other.name} ({other.state})")
        return other is None

    def _tell_of_wait(self, waits_for: str | None) -> None:
        """Have the log and the next heartbeat say for which worker this one waits; None: none."""
        if waits_for == self._keeper.identity.facts.get(workers.WAITS_FOR):
            return
        if waits_for is not None:
            log.info("start_anew_waits", number=self._current.number, waits_for=waits_for)
        self._keeper.describe(facts={workers.WAITS_FOR: waits_for})
