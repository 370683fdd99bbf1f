"""Clients that cost little: raw HTTP/1.1 over asyncio, each with one request under way at any time.

    python -m benchmarks.gateway.http_load URL CLIENTS SECONDS < one API key a line

Prints one JSON object: requests answered 202, those answered otherwise by status, seconds, and
latencies in milliseconds. A process of its own, and far cheaper than what it measures: it writes
bytes that are ready and looks at the status line.
"""

import asyncio
import json
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from benchmarks.lib.statistics import percentile

PROMPT = "a large red circle in the center on a blue background"
WARM_UP_S = 0.5


@dataclass
class Load:
    """Where requests go, for how long, and what was answered. Instants of time.perf_counter()."""

    address: tuple[str, int]
    counted_from: float
    until: float
    taken_ms: list[float] = field(default_factory=list)
    other: Counter[int] = field(default_factory=Counter)

    def count(self, status: int, started_at: float, ended_at: float) -> None:
        """Count an answer that came in the time that counts, whenever its request was sent.

        Requests that are as slow as the time is long would otherwise not be seen at all.
        """
        if self.counted_from <= ended_at <= self.until:
            if status == 202:
                self.taken_ms.append((ended_at - started_at) * 1000)
            else:
                self.other[status] += 1


async def _answer(reader: asyncio.StreamReader) -> int:
    """Read an answer; return its status."""
    head = await reader.readuntil(b"\r\n\r\n")
    status = int(head[9:12])
    length = 0
    for line in head.split(b"\r\n"):
        if line.lower().startswith(b"content-length:"):
            length = int(line.split(b":")[1])
    if length:
        await reader.readexactly(length)
    return status


async def _client(load: Load, key: str) -> None:
    """Send one request after the other on one connection."""
    request = _request(load.address[0], key)
    reader, writer = await asyncio.open_connection(*load.address)
    try:
        while (started_at := time.perf_counter()) < load.until:
            writer.write(request)
            status = await _answer(reader)
            load.count(status, started_at, time.perf_counter())
    finally:
        writer.close()


def _request(host: str, key: str) -> bytes:
    """Return the bytes of a request."""
    body = json.dumps({"prompt": PROMPT, "tier": "batch", "steps": 4}).encode()
    head = (
        "POST /v1/jobs HTTP/1.1\r\n"
        f"Host: {host}\r\n"
        f"Authorization: Bearer {key}\r\n"
        "Content-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def run(url: str, clients: int, seconds: float, keys: list[str]) -> dict[str, Any]:
    """Load the URL's host for `seconds` after a short warm-up; return the figures."""
    parts = urlsplit(url)
    counted_from = time.perf_counter() + WARM_UP_S
    load = Load(
        address=(str(parts.hostname), int(parts.port or 80)),
        counted_from=counted_from,
        until=counted_from + seconds,
    )
    await asyncio.gather(*(_client(load, keys[number % len(keys)]) for number in range(clients)))
    taken_ms = sorted(load.taken_ms)
    if not taken_ms:
        raise SystemExit(f"nothing was accepted: {dict(load.other)}")
    return {
        "accepted": len(taken_ms),
        "other": dict(load.other),
        "seconds": seconds,
        "per_s": len(taken_ms) / seconds,
        "p50_ms": percentile(taken_ms, 0.5),
        "p99_ms": percentile(taken_ms, 0.99),
    }


def main() -> None:
    """Load as the command line says; API keys come on standard input."""
    _, url, clients, seconds = sys.argv
    keys = sys.stdin.read().split()
    print(json.dumps(asyncio.run(run(url, int(clients), float(seconds), keys))))


if __name__ == "__main__":
    main()
