"""What the platform costs, and what batching gives back: images/s through REST to S3 against plain pipeline calls.

    python -m benchmarks.overhead [--quick]

Both sides run the same checkpoint, size, sampler, steps, guidance and precision with the same number of torch threads,
on the same machine, in turns: a stretch of plain `StableDiffusionPipeline` calls, one after the other, before and after
every stretch of requests. The ratio of each stretch is taken against the plain stretches beside it, for machines drift.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from darkroom_client import Client
from fleet.stack import Stack
from policy.fleet import parse_fleet
from settings import REPO

TIER, STEPS, TORCH_THREADS = "fast", 20, 1
IN_FLIGHT = (1, 4, 16)
TARGETS = {"ratio_at_16": 1.0}  # with 16 in flight, batching must more than pay for the way through the house
PROMPT = "a large red circle at the top on a blue background"


@dataclass(frozen=True)
class Stretch:
    """Images made in one go."""

    images: int
    seconds: float

    @property
    def rate(self) -> float:
        return self.images / self.seconds


class PlainPipeline:
    """A process of its own that holds the pipeline and renders when told, one call per image."""

    def __init__(self, checkpoint: Path, precision: str, guidance: float) -> None:
        arguments = [sys.executable, "-m", "benchmarks.overhead", "--plain", str(checkpoint), precision, str(guidance)]
        self._process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPO)
        self.facts = json.loads(self._answer())

    def run(self, images: int) -> Stretch:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{images}\n")
        self._process.stdin.flush()
        return Stretch(images, float(self._answer()))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("the plain pipeline ended early")
        return line


def plain_main(checkpoint: str, precision: str, guidance: str) -> None:
    """The other process: reads a number of images a line, answers with the seconds that so many calls took."""
    import torch
    from diffusers import StableDiffusionPipeline

    torch.set_num_threads(TORCH_THREADS)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    pipe = StableDiffusionPipeline.from_pretrained(
        checkpoint, torch_dtype=dtype, safety_checker=None, use_safetensors=True, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    if torch.cuda.is_available():
        pipe.to("cuda:0")

    def render(seed: int) -> None:
        generator = torch.Generator("cpu").manual_seed(seed)
        pipe(PROMPT, num_inference_steps=STEPS, guidance_scale=float(guidance), generator=generator, output_type="np")

    render(0)
    print(json.dumps({"device": str(pipe.device), "dtype": str(dtype), "torch_threads": torch.get_num_threads()}), flush=True)
    for line in sys.stdin:
        started_at = time.perf_counter()
        for seed in range(int(line)):
            render(seed)
        print(time.perf_counter() - started_at, flush=True)


def through_rest(client: Client, images: int, in_flight: int) -> Stretch:
    """Accept to stored, with `in_flight` requests under way at any time."""

    def one(seed: int) -> None:
        job = client.create_job(prompt=PROMPT, tier=TIER, steps=STEPS, seed=seed)
        job = client.wait(job.id, timeout_s=300)
        if job.state != "succeeded":
            raise SystemExit(f"job {job.id} ended {job.state}: {job.failure}")

    started_at = time.perf_counter()
    with ThreadPoolExecutor(in_flight) as pool:
        list(pool.map(one, range(images)))
    return Stretch(images, time.perf_counter() - started_at)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer images; ends within a minute")
    parser.add_argument("--plain", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plain:
        plain_main(*options.plain)
        return 0
    rounds = 1 if options.quick else 3
    images = {1: 3, 4: 6, 16: 12} if options.quick else {1: 12, 4: 24, 16: 64}
    plain_images = 3 if options.quick else 12
    fleet = parse_fleet((REPO / "fleet.toml").read_text())
    model = next(iter(fleet.models.values()))
    with tempfile.TemporaryDirectory(prefix="darkroom-bench-") as folder:
        stack = Stack(Path(folder))
        try:
            stack.up()
            client = Client(stack.env["DARKROOM_URL"], stack.env["DARKROOM_API_KEY"])
            plain = PlainPipeline(REPO / model.versions[0].source, model.precision, model.default_guidance)
            through_rest(client, 4, 4)  # warm connections
            rates, ratios, plain_rates = _measure(client, plain, rounds, images, plain_images)
            plain.close()
        finally:
            stack.down()
    return _report(rates, ratios, plain_rates, plain.facts, model.precision)


def _measure(
    client: Client, plain: PlainPipeline, rounds: int, images: dict[int, int], plain_images: int
) -> tuple[dict[int, list[float]], dict[int, list[float]], list[float]]:
    """Rates and ratios by requests in flight, one value a round, and the rates of the plain stretches."""
    rates: dict[int, list[float]] = {n: [] for n in IN_FLIGHT}
    ratios: dict[int, list[float]] = {n: [] for n in IN_FLIGHT}
    plain_rates = [plain.run(plain_images).rate]
    for _ in range(rounds):
        for in_flight in IN_FLIGHT:
            rate = through_rest(client, images[in_flight], in_flight).rate
            plain_rates.append(plain.run(plain_images).rate)
            rates[in_flight].append(rate)
            ratios[in_flight].append(rate / statistics.mean(plain_rates[-2:]))
    return rates, ratios, plain_rates


def _report(
    rates: dict[int, list[float]], ratios: dict[int, list[float]], plain_rates: list[float], facts: dict[str, object], precision: str
) -> int:
    plain_rate = statistics.median(plain_rates)
    table = Table(title=f"{STEPS} steps with CFG, tier {TIER}, {precision}, {TORCH_THREADS} torch thread on both sides, {facts['device']}")
    for column in ("requests in flight", "images/s through REST to S3", "plain calls, images/s", "ratio"):
        table.add_column(column, justify="right")
    for n in IN_FLIGHT:
        table.add_row(str(n), f"{statistics.median(rates[n]):.2f}", f"{plain_rate:.2f}", f"{statistics.median(ratios[n]):.2f}")
    Console().print(table)
    figures = {"plain_images_per_s": round(plain_rate, 3), "plain_spread": [round(min(plain_rates), 3), round(max(plain_rates), 3)]}
    for n in IN_FLIGHT:
        figures[f"images_per_s_at_{n}"] = round(statistics.median(rates[n]), 3)
        figures[f"ratio_at_{n}"] = round(statistics.median(ratios[n]), 3)
    met = {name: figures[name] > least for name, least in TARGETS.items()}
    print(
        json.dumps({"benchmark": "overhead", "figures": figures, "targets": {k: f"> {v}" for k, v in TARGETS.items()}, "met": met} | facts)
    )
    return 0 if all(met.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
