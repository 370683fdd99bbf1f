"""The asyncio client on the real stack: many at once, on one loop, with everything checked."""

import asyncio
import hashlib
import subprocess
import sys

import pytest

from darkroom_client import AsyncClient, ProblemError, WaitTimeout
from settings import REPO


@pytest.fixture
def with_client(stack):
    """Run a coroutine function with a client of the stack."""

    def with_client(act):
        async def whole():
            async with AsyncClient(
                stack.env["DARKROOM_URL"], stack.env["DARKROOM_API_KEY"]
            ) as client:
                return await act(client)

        return asyncio.run(whole())

    return with_client


def test_a_dozen_jobs_at_once_end_as_files_with_the_right_bytes(with_client, tmp_path):
    async def make(client):
        async def one(seed):
            job = await client.create_job("a red circle", tier="fast", steps=2, seed=seed)
            job = await client.wait(job.id)
            return job, await client.download(job, tmp_path, names="{seed}-{index}")

        return await asyncio.gather(*(one(seed) for seed in range(12)))

    made = with_client(make)

    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{seed}-0.png" for seed in range(12)
    )
    for job, [path] in made:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == job.images[0].content_sha256


def test_the_same_key_is_the_same_job(with_client):
    async def ask(client):
        fields = {"tier": "fast", "seed": 7, "idempotency_key": f"twice-{id(client)}"}
        return await asyncio.gather(
            *(client.create_job("a red circle", **fields) for _ in range(5))
        )

    assert len({job.id for job in with_client(ask)}) == 1


def test_jobs_are_iterated_over_pages(with_client):
    async def listed(client):
        ids = [(await client.create_job("a blue star", tier="fast", steps=1)).id for _ in range(3)]
        seen = []
        async for job in client.jobs(page_size=2):
            seen.append(job.id)
            if len(seen) == 3:
                break
        return ids, seen

    ids, seen = with_client(listed)
    assert seen == ids[::-1]


def test_a_loop_that_goes_away_takes_its_wait_along_and_leaves_the_job(with_client):
    async def leave(client):
        job = await client.create_job("a red circle", tier="batch", steps=60)
        with pytest.raises(WaitTimeout):
            await client.wait(job.id, timeout_s=0)
        waiting = asyncio.create_task(client.wait(job.id))
        await asyncio.sleep(0.2)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        state = (await client.job(job.id)).state
        await client.cancel(job.id)
        return state

    assert with_client(leave) in ("queued", "running", "storing")


def test_a_refusal_is_raised_in_the_loop(with_client):
    async def ask(client):
        with pytest.raises(ProblemError) as caught:
            await client.create_job("a red circle", tier="fast", steps=900)
        return caught.value

    problem = with_client(ask)
    assert (problem.slug, problem.status, problem.errors[0].pointer) == (
        "invalid-image-request",
        422,
        "/steps",
    )


def test_events_are_told_to_the_end(with_client):
    async def follow(client):
        job = await client.create_job("a red circle", tier="fast", steps=3, seed=7)
        return [event async for event in client.events(job.id)]

    events = with_client(follow)

    kinds = [event.kind for event in events]
    assert kinds[-1] == "final"
    assert {"started", "step", "stored"} <= set(kinds)
    assert events[-1].data["state"] == "succeeded"


def test_a_batch_tells_of_each_job_what_became_of_it(with_client):
    async def ask(client):
        jobs = [
            {"prompt": "a red circle", "tier": "fast"},
            {"prompt": "x", "tier": "fast", "steps": 900},
        ]
        submissions = await client.create_jobs(jobs)
        return submissions, await client.wait(submissions[0].job_id)

    (accepted, refused), job = with_client(ask)

    assert (accepted.problem, job.state) == (None, "succeeded")
    assert (refused.job_id, refused.problem.slug) == (None, "invalid-image-request")


def test_status_and_estimate_are_read(with_client):
    async def ask(client):
        job = await client.create_job("a red circle", tier="fast", steps=2)
        await client.wait(job.id)
        return await client.status(job.id), await client.estimate(
            "a red circle", tier="fast", steps=2
        )

    status, estimate = with_client(ask)

    assert (status.is_finished, status.state) == (True, "succeeded")
    assert (estimate.can_be_served, estimate.steps, estimate.refusal) == (True, 2, None)
    assert estimate.cost.currency == "USD"


def test_a_client_alone_needs_httpx_and_the_standard_library(tmp_path):
    """Copied out of the house, in a process where nothing else can be imported."""
    import shutil

    shutil.copytree(REPO / "darkroom_client", tmp_path / "darkroom_client")
    program = """
import sys
ALLOWED = {"darkroom_client", "httpx", "httpcore", "h11", "anyio", "sniffio", "certifi", "idna"}
ALLOWED.add("typing_extensions")
class OnlyThese:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in ALLOWED and top not in sys.stdlib_module_names:
            raise ModuleNotFoundError(f"{name} is not there")
sys.meta_path.insert(0, OnlyThese())
import darkroom_client
assert darkroom_client.__file__.startswith(sys.argv[1]), darkroom_client.__file__
once = darkroom_client.Retries(attempts=1)
client = darkroom_client.Client("http://127.0.0.1:1", "k", retries=once)
try:
    client.job("x")
except darkroom_client.Unreachable:
    print("alone")
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={},
    )

    assert (done.stdout.strip(), done.stderr) == ("alone", "")
