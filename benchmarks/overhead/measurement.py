"""Stretches of requests through REST, each between two stretches of plain pipeline calls."""

import statistics
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from benchmarks.overhead.plain_calls import PROMPT, STEPS, PlainCalls, Stretch
from darkroom_client import Client

TIER = "fast"
IN_FLIGHT = (1, 4, 16)


@dataclass(frozen=True, kw_only=True)
class Extent:
    """How much is measured."""

    rounds: int
    images: Mapping[int, int]  # of a stretch, by requests in flight
    plain_images: int


FULL = Extent(rounds=3, images={1: 12, 4: 24, 16: 64}, plain_images=12)
QUICK = Extent(rounds=1, images={1: 3, 4: 6, 16: 12}, plain_images=3)


@dataclass(frozen=True)
class Findings:
    """Images/s, and ratios to plain calls, by requests in flight: one value a round."""

    rates: dict[int, list[float]]
    ratios: dict[int, list[float]]
    plain_rates: list[float]  # of all plain stretches


def measure(client: Client, plain: PlainCalls, extent: Extent) -> Findings:
    """Take turns, so that both sides meet the same machine."""
    through_rest(client, 4, 4)  # warm connections
    rates: dict[int, list[float]] = {n: [] for n in IN_FLIGHT}
    ratios: dict[int, list[float]] = {n: [] for n in IN_FLIGHT}
    plain_rates = [plain.run(extent.plain_images).rate]
    for _ in range(extent.rounds):
        for in_flight in IN_FLIGHT:
            rate = through_rest(client, extent.images[in_flight], in_flight).rate
            plain_rates.append(plain.run(extent.plain_images).rate)
            rates[in_flight].append(rate)
            ratios[in_flight].append(rate / statistics.mean(plain_rates[-2:]))
    return Findings(rates, ratios, plain_rates)


def through_rest(client: Client, images: int, in_flight: int) -> Stretch:
    """Time images from accept to stored, with `in_flight` requests under way at any time."""

    def one(seed: int) -> None:
        job = client.create_job(prompt=PROMPT, tier=TIER, steps=STEPS, seed=seed)
        job = client.wait(job.id, timeout_s=300)
        if job.state != "succeeded":
            raise SystemExit(f"job {job.id} ended {job.state}: {job.failure}")

    started_at = time.perf_counter()
    with ThreadPoolExecutor(in_flight) as pool:
        list(pool.map(one, range(images)))
    return Stretch(images, time.perf_counter() - started_at)
