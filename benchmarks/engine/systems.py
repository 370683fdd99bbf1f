"""The four ways to serve, behind one interface.

`submit` takes a request at once and tells on another thread when its pixels are there. Every one of
them computes on one torch thread. Three live in this process, whose other threads hardly do more
than wait; LitServe has processes of its own and is asked by HTTP, as its users would.
"""

import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import httpx
import numpy as np
from numpy.typing import NDArray

from benchmarks.engine.traffic import by_kind
from benchmarks.lib.pipeline import PlainPipeline
from benchmarks.lib.progress import log_progress
from engine.engine import Engine
from engine.events import EngineEvent, Failed, Finished
from engine.request import ImageRequest
from settings import REPO

Pixels = NDArray[np.uint8]  # [h, w, 3]
Outcome = Pixels | Exception
Tell = Callable[[Outcome], None]
LITSERVE_STARTS_WITHIN_S = 180


class System(Protocol):
    """Something that serves."""

    def submit(self, request: ImageRequest, tell: Tell) -> None:
        """Take a request.

        `tell` is called once, on any thread, with the pixels or with what went wrong.
        """


class Ours:
    """The engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def submit(self, request: ImageRequest, tell: Tell) -> None:
        """See `System`."""

        def on_event(event: EngineEvent) -> None:
            if isinstance(event, Finished):
                tell(event.image.pixels)
            elif isinstance(event, Failed):
                tell(event.error)

        self._engine.submit(request, on_event)


class WholeRequests:
    """A worker that renders up to `max_batch` waiting requests at a time.

    By one pipeline call for each kind among them. It waits for company until the oldest is
    `window_s` old or the batch is full; what waited while it was busy has waited enough. With a
    batch of one and no window it is the plain loop: first come, first served.
    """

    def __init__(self, pipe: PlainPipeline, *, max_batch: int, window_s: float) -> None:
        self._pipe = pipe
        self._max_batch = max_batch
        self._window_s = window_s
        self._waiting: list[tuple[float, ImageRequest, Tell]] = []
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._work)

    def __enter__(self) -> "WholeRequests":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def submit(self, request: ImageRequest, tell: Tell) -> None:
        """See `System`."""
        with self._changed:
            self._waiting.append((time.monotonic(), request, tell))
            self._changed.notify()

    def _work(self) -> None:
        while taken := self._take():
            tells = {request.id: tell for _, request, tell in taken}
            for group in by_kind([request for _, request, _ in taken]):
                for request, outcome in zip(group, self._render(group), strict=True):
                    tells[request.id](outcome)

    def _take(self) -> list[tuple[float, ImageRequest, Tell]]:
        """Wait for a batch; [] when closed."""
        with self._changed:
            while not self._is_closed:
                waits_s = (
                    self._waiting[0][0] + self._window_s - time.monotonic()
                    if self._waiting
                    else None
                )
                is_due = waits_s is not None and waits_s <= 0
                if is_due or len(self._waiting) >= self._max_batch:
                    taken = self._waiting[: self._max_batch]
                    self._waiting = self._waiting[self._max_batch :]
                    return taken
                self._changed.wait(waits_s)
        return []

    def _render(self, group: Sequence[ImageRequest]) -> Sequence[Outcome]:
        try:
            return self._pipe.render(group)
        except Exception as problem:  # noqa: BLE001  the comparison ends with it
            return [problem] * len(group)


class LitServe:
    """The asking side of LitServe."""

    def __init__(self, http: httpx.Client, threads: ThreadPoolExecutor) -> None:
        self._http = http
        self._threads = threads

    def submit(self, request: ImageRequest, tell: Tell) -> None:
        """See `System`."""
        self._threads.submit(self._ask, request, tell)

    def round_trip_s(self, request: ImageRequest) -> float:
        """Measure what HTTP and the way through LitServe's processes cost alone.

        As many bytes as `request` would get, made of nothing.
        """
        taken_s = []
        for _ in range(30):
            started_at = time.perf_counter()
            self._pixels("/empty", request)
            taken_s.append(time.perf_counter() - started_at)
        return statistics.median(taken_s)

    def _ask(self, request: ImageRequest, tell: Tell) -> None:
        try:
            tell(self._pixels("/predict", request))
        except Exception as problem:  # noqa: BLE001  the comparison ends with it
            tell(problem)

    def _pixels(self, path: str, request: ImageRequest) -> Pixels:
        response = self._http.post(path, json=asdict(request))
        response.raise_for_status()
        return np.frombuffer(response.content, np.uint8).reshape(
            request.height_px, request.width_px, 3
        )


@contextmanager
def litserve(checkpoint: Path, precision: str, device: str) -> Iterator[LitServe]:
    """Start LitServe; end it with all its processes."""
    with socket.socket() as free, tempfile.TemporaryFile("w+") as log:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        module = "benchmarks.engine.litserve_server"
        arguments = (str(port), str(checkpoint), precision, device)
        server = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=REPO,
            env={**os.environ, "PYTHONPATH": str(litserve_site())},
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        assert server.stdin is not None
        try:
            with _client(port) as http, ThreadPoolExecutor(256) as threads:
                if not _is_healthy(server, http):
                    log.seek(0)
                    raise SystemExit(f"LitServe did not start:\n{log.read()[-4000:]}")
                yield LitServe(http, threads)
        finally:
            server.stdin.close()  # it ends then
            server.wait(timeout=30)


def _client(port: int) -> httpx.Client:
    """Connect to LitServe.

    No gzip: pixels do not shrink enough to pay for it. Connections are given up before the server
    would close them.
    """
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=2)
    return httpx.Client(
        base_url=f"http://127.0.0.1:{port}",
        headers={"Accept-Encoding": "identity"},
        limits=limits,
        timeout=600,
        trust_env=False,
    )


def litserve_site() -> Path:
    """Return the folder with requirements/bench.txt, installed there when it is not.

    Nothing else in Darkroom needs any of it.
    """
    wanted = (REPO / "requirements/bench.txt").read_text()
    site = REPO / ".darkroom/bench-site"
    installed = site / "requirements.txt"
    if not installed.exists() or installed.read_text() != wanted:
        shutil.rmtree(site, ignore_errors=True)
        log_progress("installing requirements/bench.txt into .darkroom/bench-site")
        pip = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
        what = ["--no-deps", "--target", str(site), "-r", str(REPO / "requirements/bench.txt")]
        subprocess.run([*pip, *what], check=True, stdout=sys.stderr)
        installed.write_text(wanted)
    return site


def _is_healthy(server: subprocess.Popen[bytes], http: httpx.Client) -> bool:
    deadline = time.monotonic() + LITSERVE_STARTS_WITHIN_S
    while server.poll() is None and time.monotonic() < deadline:
        try:
            if http.get("/health").status_code == httpx.codes.OK:
                return True
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(0.1)
    return False
