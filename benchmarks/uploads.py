"""What hostile bodies cost the gateway: processor time for each, and what /healthz does meanwhile.

    python -m benchmarks.uploads [--quick]

5,000 generated bodies and 60 of some 30 MB (benchmarks/door/uploads.py) go to the routes that take pictures: four fifths one by one, for
what each takes of the gateway's process and of its decoders, the others through eight clients at once. All the while another process
asks /healthz fifty times a second. No worker runs, so what is accepted waits.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.door.uploads import Upload, uploads
from benchmarks.serving.cells import percentile
from fleet.stack import Stack
from settings import REPO

CLIENTS = 8
TARGETS = {
    "gateway_cpu_s": ("<=", 2.0),  # of the gateway's process for one request, at worst
    "decoder_cpu_s": ("<=", 2.0),  # of its decoders for one request, at worst
    "healthz_p99_ms": ("<=", 200.0),  # the worse of both passes
    "unexpected_answers": ("<=", 0),  # of 5xx: all but the 503 that says that many pictures are being read
}


@dataclass(frozen=True)
class Cost:
    """What one request took."""

    name: str
    status: int
    wall_s: float
    gateway_s: float
    decoders_s: float


class Meter:
    """Processor time of the gateway's one process, and of its decoders, those that have died included."""

    def __init__(self, stack: Stack) -> None:
        [self._process] = psutil.Process(stack.pid("gateway")).children()

    def read(self) -> tuple[float, float]:
        own = self._process.cpu_times()
        decoders = own.children_user + own.children_system
        for child in self._process.children():
            try:
                times = child.cpu_times()
                decoders += times.user + times.system
            except psutil.NoSuchProcess:
                continue
        return own.user + own.system, decoders


@contextmanager
def running() -> Iterator[Stack]:
    with tempfile.TemporaryDirectory(prefix="darkroom-bench-") as folder:
        os.chmod(folder, 0o711)  # Postgres, of another account when we are root, passes through
        stack = Stack(Path(folder) / "data")
        try:
            stack.up()
            for name in ("worker-1", "results", "flower"):
                stack.stop(name)
            yield stack
        finally:
            stack.down()


@contextmanager
def pulse(url: str) -> Iterator[list[float]]:
    """Milliseconds that /healthz took, once it is over."""
    command = [sys.executable, "-m", "benchmarks.door.pulse", url]
    process = subprocess.Popen(command, cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    took_ms: list[float] = []
    try:
        yield took_ms
    finally:
        out, _ = process.communicate("", timeout=90)
        took_ms += json.loads(out)


def send(client: httpx.Client, upload: Upload) -> int:
    answer = client.post(upload.path, content=upload.content, headers={"Content-Type": upload.content_type})
    return 0 if answer.status_code == 503 and answer.json().get("part") == "pictures" else answer.status_code


def one_by_one(client: httpx.Client, meter: Meter, sent: Iterator[Upload]) -> list[Cost]:
    costs = []
    for upload in sent:
        gateway_s, decoders_s = meter.read()
        began = time.perf_counter()
        status = send(client, upload)
        wall_s = time.perf_counter() - began
        now = meter.read()
        costs.append(Cost(upload.name, status, wall_s, now[0] - gateway_s, max(0.0, now[1] - decoders_s)))
    return costs


def at_once(client: httpx.Client, sent: Iterator[Upload]) -> list[int]:
    """Through so many clients, each with a body of its own in hand."""
    turn = threading.Lock()

    def work(_: int) -> list[int]:
        answers = []
        while True:
            with turn:
                upload = next(sent, None)
            if upload is None:
                return answers
            answers.append(send(client, upload))

    with ThreadPoolExecutor(CLIENTS) as threads:
        return [status for answers in threads.map(work, range(CLIENTS)) for status in answers]


def report(costs: Sequence[Cost], together: Sequence[int], alone_ms: Sequence[float], together_ms: Sequence[float], took_s: float) -> int:
    table = Table(title="The dearest bodies")
    for column in ("body", "status", "gateway CPU s", "decoder CPU s", "wall s"):
        table.add_column(column, justify="left" if column == "body" else "right")
    for cost in sorted(costs, key=lambda cost: cost.gateway_s + cost.decoders_s, reverse=True)[:12]:
        table.add_row(cost.name[:60], str(cost.status), f"{cost.gateway_s:.2f}", f"{cost.decoders_s:.2f}", f"{cost.wall_s:.2f}")
    Console(width=140).print(table)
    statuses = Counter([cost.status for cost in costs] + list(together))
    reached: dict[str, float] = {
        "gateway_cpu_s": round(max(cost.gateway_s for cost in costs), 3),
        "decoder_cpu_s": round(max(cost.decoders_s for cost in costs), 3),
        "healthz_p99_ms": round(max(percentile(alone_ms, 0.99), percentile(together_ms, 0.99)), 1),
        "unexpected_answers": sum(count for status, count in statuses.items() if status >= 500),
    }
    figures: dict[str, Any] = {
        "bodies": len(costs) + len(together),
        "answers": {str(status or "503 pictures"): count for status, count in sorted(statuses.items())},
        "gateway_cpu_mean_ms": round(1000 * statistics.mean(cost.gateway_s for cost in costs), 2),
        "healthz_p50_ms": round(statistics.median([*alone_ms, *together_ms]), 2),
        "healthz_p99_one_by_one_ms": round(percentile(alone_ms, 0.99), 1),
        "healthz_p99_at_once_ms": round(percentile(together_ms, 0.99), 1),
        "healthz_worst_ms": round(max([*alone_ms, *together_ms]), 1),
        "seconds": round(took_s, 1),
    }
    for name, value in {**figures, **reached}.items():
        print(f"{name}: {value}")
    met = {name: reached[name] <= at for name, (_, at) in TARGETS.items()}
    targets = {name: f"{sign} {at}" for name, (sign, at) in TARGETS.items()}
    print(json.dumps({"benchmark": "uploads", "figures": figures | reached, "targets": targets, "met": met}))
    return 0 if all(met.values()) else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="140 bodies and 9 large ones; ends within a minute")
    options = parser.parse_args()
    count, large = (80, 6) if options.quick else (4_000, 40)
    together, together_large = (60, 3) if options.quick else (1_000, 20)
    with running() as stack:
        url, key = stack.env["DARKROOM_URL"], stack.env["DARKROOM_API_KEY"]
        limits = httpx.Limits(max_connections=CLIENTS)
        with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=120, trust_env=False, limits=limits) as client:
            send(client, next(uploads(1, seed=9, large=0)))  # the first one starts a decoder
            began = time.perf_counter()
            with pulse(url) as alone_ms:
                costs = one_by_one(client, Meter(stack), uploads(count, seed=0, large=large))
            with pulse(url) as together_ms:
                answers = at_once(client, uploads(together, seed=1, large=together_large))
            took_s = time.perf_counter() - began
    return report(costs, answers, alone_ms, together_ms, took_s)


if __name__ == "__main__":
    sys.exit(main())
