"""Hold what the gateway's services work with; made once per process."""

import secrets
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Engine

from app.caller import Caller
from app.live.abilities import Abilities
from app.live.cache import Cache
from app.live.capacity import Capacity
from app.live.forecast import QueueForecaster
from app.live.keyring import Keyring
from app.live.readiness import Readiness, checks
from app.live.statuses import Statuses
from app.live.streams import JobEventStreams, Watchers
from app.live.uploads import UploadRoom
from app.signing import LinkSigner
from dispatch.endings import EndedJobs
from dispatch.following import Following
from dispatch.release import Release
from edges import telemetry
from edges.broker import Broker
from edges.decoders import Decoders
from edges.events import EventFanout
from edges.handoff import Gauge, Handoff
from edges.limits import Budgets, Rates
from edges.objectstore import ObjectStore
from edges.outbound import Outbound
from edges.progress import Endings, JobSignals
from models.database import make_engine
from policy import connections, warnings
from policy.catalog import capabilities_of, resolve
from policy.current import CurrentFleet, current
from policy.fleet import Fleet
from policy.limits import NAMES_VERSIONS
from policy.params import RequestedParams, Resolved
from policy.routing import ANYBODY, Asker
from settings import GatewaySettings


@dataclass(frozen=True)
class Runtime:
    """The connections, caches and settings that a service may use."""

    settings: GatewaySettings
    current: CurrentFleet
    following: Following
    database: Engine
    broker: Broker
    release: Release
    store: ObjectStore
    signals: JobSignals
    endings: Endings
    ended: EndedJobs
    forecaster: QueueForecaster
    events: JobEventStreams
    outbound: Outbound
    keyring: Keyring
    abilities: Abilities
    rates: Rates
    budgets: Budgets
    links: LinkSigner
    readiness: Readiness
    waits: Capacity
    uploads: UploadRoom
    decoders: Decoders = field(default_factory=Decoders)
    # Answers about pictures (does a mask select anything?), by question, content and size.
    judged: Cache[tuple[str, str, int, int], bool] = field(
        default_factory=lambda: Cache("judged", 10_000)
    )
    # The OpenAPI document by the prefix of its links (a proxy may give the gateway several), by the
    # number of the fleet's revision, and by what is offered to whoever asks.
    documents: Cache[tuple[str, ...], str] = field(default_factory=lambda: Cache("documents", 8))
    statuses: Statuses = field(default_factory=Statuses)
    watchers: Watchers = field(default_factory=Watchers)

    @property
    def fleet(self) -> Fleet:
        """Return the fleet that runs now; within a request always the same."""
        return self.current.fleet

    def resolve(self, requested: RequestedParams, asker: Asker = ANYBODY) -> Resolved:
        """Resolve every requested parameter. Raises InvalidParam.

        A seed is drawn where none was asked for.
        """
        return resolve(
            self.fleet,
            requested,
            default_seed=secrets.randbelow(2**32),
            asker=asker,
            known=self.abilities.known(),
        )

    def asker(self, caller: Caller) -> Asker:
        """Tell what of the caller decides on version and pool."""
        return Asker(
            tenant=caller.tenant,
            models=caller.limits.allowed_models,
            tiers=caller.limits.allowed_tiers,
            may_name_versions=NAMES_VERSIONS in caller.scopes,
            live=self.forecaster.live_pool,
        )

    def expected_warnings(self, job: Resolved) -> list[dict[str, Any]]:
        """List the parts of the job that are known to have no effect."""
        model = self.fleet.models[job.model].of_version(job.model_version)
        able = capabilities_of(self.abilities.known(), model, job)
        return warnings.expected(model, job, able)


def open_runtime(settings: GatewaySettings, fleet: Fleet | CurrentFleet) -> Runtime:
    """Make a runtime; connections are opened at first use.

    So a gateway starts while Postgres, Redis or the object store are away, and reports it in
    /readyz.
    """
    followed = current(fleet)
    database = make_engine(settings.database_url, pool_size=settings.database_pool_size)
    broker = Broker(settings, followed)
    release = Release(database, broker, followed, worker_silence_s=settings.lease_ttl_s)
    signals = JobSignals(settings.handoff_url)
    # An engine of its own, so that keys and queues can be read however many requests write.
    aside = make_engine(settings.database_url, pool_size=connections.GATEWAY_ASIDE)
    refresher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="refresh")
    gauge = Gauge(settings.handoff_url)
    keyring = Keyring(aside, refresher)
    handoff = Handoff(settings.handoff_url, ttl_s=settings.handoff_ttl_s)
    store = ObjectStore(settings)
    fanout = EventFanout(settings.handoff_url, most=settings.gateway_max_streams)
    forecaster = QueueForecaster(
        aside, followed, gauge, release.limits, refresher, worker_silence_s=settings.lease_ttl_s
    )
    return Runtime(
        settings=settings,
        current=followed,
        following=Following(followed, aside),
        database=database,
        broker=broker,
        release=release,
        store=store,
        signals=signals,
        endings=Endings(settings.handoff_url),
        ended=_ended_jobs(settings, signals, handoff),
        forecaster=forecaster,
        events=JobEventStreams(
            database, forecaster, signals, fanout, keyring, most=settings.gateway_max_streams
        ),
        outbound=Outbound(settings.outbound_allowed_networks),
        keyring=keyring,
        abilities=Abilities(aside, refresher, worker_silence_s=settings.lease_ttl_s),
        rates=Rates(settings.handoff_url),
        budgets=Budgets(settings.handoff_url),
        links=LinkSigner(settings.api_key_pepper.get_secret_value(), ttl_s=settings.presign_ttl_s),
        readiness=Readiness(
            checks(settings, followed, broker=broker, handoff=handoff, store=store)
        ),
        waits=Capacity(settings.max_waits, telemetry.WAITS),
        uploads=UploadRoom(settings),
    )


def _ended_jobs(settings: GatewaySettings, signals: JobSignals, handoff: Handoff) -> EndedJobs:
    return EndedJobs.connect(
        settings.handoff_url, ttl_s=settings.handoff_ttl_s, signals=signals, handoff=handoff
    )
