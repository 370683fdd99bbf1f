"""Make what every role needs that may end jobs."""

from dispatch.endings import EndedJobs
from edges.handoff import Handoff
from edges.inputs import Inputs
from edges.progress import JobSignals
from edges.snapshots import Snapshots
from settings import Settings


def ended_jobs(settings: Settings) -> EndedJobs:
    """Make what tells of ended jobs, with the clients of all that the hand-off's Redis holds."""
    return EndedJobs(
        signals=JobSignals(settings.handoff_url),
        handoff=Handoff(settings.handoff_url, ttl_s=settings.handoff_ttl_s),
        snapshots=Snapshots(settings.handoff_url, ttl_s=settings.handoff_ttl_s),
        inputs=Inputs(settings.handoff_url, ttl_s=settings.handoff_ttl_s),
    )
