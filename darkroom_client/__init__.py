"""A typed client of Darkroom's HTTP API. Needs httpx, and nothing of the house.

with Client("http://127.0.0.1:8000", "dr_…") as client:
    job = client.wait(client.create_job("a red circle on a blue background", tier="fast", seed=7).id)
    png = client.image(job, 0)
"""

from darkroom_client.client import Client
from darkroom_client.errors import (
    DarkroomError,
    DigestMismatch,
    FieldError,
    ImageNotStored,
    ProblemError,
    UnexpectedAnswer,
    Unreachable,
    WaitTimeout,
)
from darkroom_client.jobs import FINAL_STATES, Cost, Failure, Image, Job, Progress, Timing

__all__ = [
    "FINAL_STATES",
    "Client",
    "Cost",
    "DarkroomError",
    "DigestMismatch",
    "Failure",
    "FieldError",
    "Image",
    "ImageNotStored",
    "Job",
    "ProblemError",
    "Progress",
    "Timing",
    "UnexpectedAnswer",
    "Unreachable",
    "WaitTimeout",
]
