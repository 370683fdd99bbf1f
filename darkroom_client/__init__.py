"""A typed client of Darkroom's HTTP API, for threads and for asyncio.

It needs httpx and imports nothing else of this repository.

with Client("http://127.0.0.1:8000", "dr_…") as client:
    job = client.create_job("a red circle on a blue background", tier="fast", seed=7)
    job = client.wait(job.id)
    [path] = client.download(job, "images")
"""

from darkroom_client.async_client import AsyncClient
from darkroom_client.client import Client
from darkroom_client.documents import Estimate, File, Status, Submission, Usage
from darkroom_client.errors import (
    DarkroomError,
    DigestMismatch,
    FieldError,
    ImageNotStored,
    NotConfigured,
    ProblemError,
    UnexpectedAnswer,
    Unreachable,
    WaitTimeout,
)
from darkroom_client.events import Event
from darkroom_client.job_fields import JobFields
from darkroom_client.jobs import (
    FINAL_STATES,
    Cost,
    Failure,
    Image,
    Job,
    JobWarning,
    Progress,
    Queue,
    Timing,
)
from darkroom_client.retries import Retries
from darkroom_client.version import VERSION as __version__

__all__ = [
    "FINAL_STATES",
    "AsyncClient",
    "Client",
    "Cost",
    "DarkroomError",
    "DigestMismatch",
    "Estimate",
    "Event",
    "Failure",
    "FieldError",
    "File",
    "Image",
    "ImageNotStored",
    "Job",
    "JobFields",
    "JobWarning",
    "NotConfigured",
    "ProblemError",
    "Progress",
    "Queue",
    "Retries",
    "Status",
    "Submission",
    "Timing",
    "UnexpectedAnswer",
    "Unreachable",
    "Usage",
    "WaitTimeout",
    "__version__",
]
