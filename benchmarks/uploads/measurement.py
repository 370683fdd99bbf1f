"""Send bodies one by one and at once; measure what they take of the gateway's processor time."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import psutil

from benchmarks.uploads.bodies import Upload, uploads
from fleet.stack import Stack
from settings import REPO

CLIENTS = 8


@dataclass(frozen=True, kw_only=True)
class Extent:
    """How many bodies are sent, one by one and at once; large ones come beside the others."""

    one_by_one: int
    large_one_by_one: int
    at_once: int
    large_at_once: int


FULL = Extent(one_by_one=4_000, large_one_by_one=40, at_once=1_000, large_at_once=20)
QUICK = Extent(one_by_one=80, large_one_by_one=6, at_once=60, large_at_once=3)


@dataclass(frozen=True)
class Cost:
    """What one request took."""

    name: str
    status: int
    wall_s: float
    gateway_s: float
    decoders_s: float


@dataclass(frozen=True)
class Findings:
    """What the run gave. Statuses as `send` returns them."""

    costs: list[Cost]  # of bodies that were sent one by one
    statuses_at_once: list[int]
    health_one_by_one_ms: list[float]
    health_at_once_ms: list[float]
    took_s: float


class ProcessorTime:
    """Of the gateway's one process, and of its decoders, those that have died included."""

    def __init__(self, stack: Stack) -> None:
        [self._process] = psutil.Process(stack.pid("gateway")).children()

    def read(self) -> tuple[float, float]:
        """Read the seconds of the gateway's process and those of its decoders."""
        own = self._process.cpu_times()
        decoders = own.children_user + own.children_system
        for child in self._process.children():
            try:
                times = child.cpu_times()
                decoders += times.user + times.system
            except psutil.NoSuchProcess:
                continue
        return own.user + own.system, decoders


def measure(stack: Stack, extent: Extent) -> Findings:
    """Send all bodies."""
    url = stack.env["DARKROOM_URL"]
    with _client(url, stack.env["DARKROOM_API_KEY"]) as client:
        send(client, next(uploads(1, seed=9, large=0)))  # the first one starts a decoder
        started_at = time.perf_counter()
        with health_probe(url) as one_by_one_ms:
            sent = uploads(extent.one_by_one, seed=0, large=extent.large_one_by_one)
            costs = send_one_by_one(client, ProcessorTime(stack), sent)
        with health_probe(url) as at_once_ms:
            sent = uploads(extent.at_once, seed=1, large=extent.large_at_once)
            statuses = send_at_once(client, sent)
        took_s = time.perf_counter() - started_at
    return Findings(costs, statuses, one_by_one_ms, at_once_ms, took_s)


def send(client: httpx.Client, upload: Upload) -> int:
    """Send one body; return the status, 0 for the 503 that says that many pictures are read."""
    headers = {"Content-Type": upload.content_type}
    answer = client.post(upload.path, content=upload.content, headers=headers)
    if answer.status_code == 503 and answer.json().get("part") == "pictures":
        return 0
    return answer.status_code


def send_one_by_one(
    client: httpx.Client, processor: ProcessorTime, sent: Iterator[Upload]
) -> list[Cost]:
    """Send one body after the other; return what each took."""
    costs = []
    for upload in sent:
        gateway_s, decoders_s = processor.read()
        began = time.perf_counter()
        status = send(client, upload)
        wall_s = time.perf_counter() - began
        gateway_after_s, decoders_after_s = processor.read()
        costs.append(
            Cost(
                name=upload.name,
                status=status,
                wall_s=wall_s,
                gateway_s=gateway_after_s - gateway_s,
                decoders_s=max(0.0, decoders_after_s - decoders_s),
            )
        )
    return costs


def send_at_once(client: httpx.Client, sent: Iterator[Upload]) -> list[int]:
    """Send through so many clients, each with a body of its own in hand; return the statuses."""
    turn = threading.Lock()

    def work(_: int) -> list[int]:
        answers: list[int] = []
        while True:
            with turn:
                upload = next(sent, None)
            if upload is None:
                return answers
            answers.append(send(client, upload))

    with ThreadPoolExecutor(CLIENTS) as threads:
        return [status for answers in threads.map(work, range(CLIENTS)) for status in answers]


@contextmanager
def health_probe(url: str) -> Iterator[list[float]]:
    """Yield a list that has the milliseconds that /healthz took, once it is over."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.uploads.health_probe", url],
        cwd=REPO,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    took_ms: list[float] = []
    try:
        yield took_ms
    finally:
        out, _ = process.communicate("", timeout=90)
        took_ms += json.loads(out)


def _client(url: str, key: str) -> httpx.Client:
    return httpx.Client(
        base_url=url,
        headers={"Authorization": f"Bearer {key}"},
        timeout=120,
        trust_env=False,
        limits=httpx.Limits(max_connections=CLIENTS),
    )
