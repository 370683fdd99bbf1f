"""Clients that cost little: raw HTTP/1.1 over asyncio, each with one request under way at any time.

    python -m benchmarks.door.load URL CLIENTS SECONDS < one API key a line

Prints one JSON object: requests answered 202, those answered otherwise by status, seconds, and latencies in milliseconds. A process of its
own, and far cheaper than what it measures: it writes bytes that are ready and looks at the status line.
"""

import asyncio
import json
import sys
import time
from collections import Counter
from urllib.parse import urlsplit

from benchmarks.serving.cells import percentile

PROMPT = "a large red circle in the center on a blue background"
WARM_UP_S = 0.5


async def _answer(reader: asyncio.StreamReader) -> int:
    head = await reader.readuntil(b"\r\n\r\n")
    status, length = int(head[9:12]), 0
    for line in head.split(b"\r\n"):
        if line.lower().startswith(b"content-length:"):
            length = int(line.split(b":")[1])
    if length:
        await reader.readexactly(length)
    return status


async def _client(
    address: tuple[str, int], key: str, until: float, counted_from: float, taken_ms: list[float], other: Counter[int]
) -> None:
    body = json.dumps({"prompt": PROMPT, "tier": "batch", "steps": 4}).encode()
    head = f"POST /v1/jobs HTTP/1.1\r\nHost: {address[0]}\r\nAuthorization: Bearer {key}\r\nContent-Type: application/json\r\n"
    request = head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
    reader, writer = await asyncio.open_connection(*address)
    try:
        while (started_at := time.perf_counter()) < until:
            writer.write(request)
            status = await _answer(reader)
            ended_at = time.perf_counter()
            if counted_from <= started_at and ended_at <= until:
                if status == 202:
                    taken_ms.append((ended_at - started_at) * 1000)
                else:
                    other[status] += 1
    finally:
        writer.close()


async def run(url: str, clients: int, seconds: float, keys: list[str]) -> dict:
    """Load the URL's host for `seconds` after a short warm-up; the figures."""
    parts = urlsplit(url)
    address = (str(parts.hostname), int(parts.port or 80))
    taken_ms: list[float] = []
    other: Counter[int] = Counter()
    counted_from = time.perf_counter() + WARM_UP_S
    until = counted_from + seconds
    tasks = [_client(address, keys[number % len(keys)], until, counted_from, taken_ms, other) for number in range(clients)]
    await asyncio.gather(*tasks)
    taken_ms.sort()
    if not taken_ms:
        raise SystemExit(f"nothing was accepted: {dict(other)}")
    figures = {"accepted": len(taken_ms), "other": dict(other), "seconds": seconds, "per_s": len(taken_ms) / seconds}
    return figures | {"p50_ms": percentile(taken_ms, 0.5), "p99_ms": percentile(taken_ms, 0.99)}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(run(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.stdin.read().split()))))
