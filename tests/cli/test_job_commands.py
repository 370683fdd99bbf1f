"""watch, replay, estimate, delete, jobs: what they print about real jobs, and their exit codes."""

import json
import re
import time
from datetime import UTC

import click
import httpx
import pytest
from click.testing import CliRunner
from PIL import Image

from cli.installation import Installation
from cli.job_options import job_options
from cli.jobs import _instant
from cli.main import darkroom
from darkroom_client import Client
from tests.cli.terminal import Terminal, piped
from tests.client.test_client import PNG
from tests.client.test_client import a_job as a_played_job

NOBODY = "00000000-0000-0000-0000-000000000000"


@pytest.fixture(autouse=True)
def _no_installation_of_the_callers(monkeypatch):
    for name in ("DARKROOM_URL", "DARKROOM_API_KEY", "DARKROOM_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)


def run(stack, *arguments, **options):
    return CliRunner().invoke(
        darkroom, ["--data-dir", str(stack.data_dir), *map(str, arguments)], **options
    )


def test_a_job_is_watched_from_the_queue_to_its_end(stack, client, tmp_path):
    job = client.create_job("a red circle", tier="fast", seed=7)

    process = piped(stack.data_dir, "watch", job.id, cwd=tmp_path)
    out, err = process.communicate(timeout=120)

    assert process.returncode == 0
    assert f"job {job.id} is succeeded" in out
    assert "denoise s" in out
    # nothing to tell of one that ended before we looked
    assert err == "" or err.splitlines()[-1] == f"job {job.id} is succeeded"


def test_watching_a_job_on_a_terminal_shows_a_bar_and_ctrl_c_leaves_the_job_alone(
    stack, client, tmp_path
):
    job = client.create_job("a red circle", tier="batch", steps=60, n=2)

    terminal = Terminal(stack.data_dir, "watch", job.id, cwd=tmp_path)
    terminal.read_until(job.id[-8:], "step ", "/120")
    terminal.press_ctrl_c()

    assert terminal.end() == 130
    assert f"job {job.id} goes on" in terminal.shown
    assert client.cancel(job.id).state == "canceled"


def test_a_job_that_did_not_succeed_ends_the_watch_with_1(stack, client):
    job = client.cancel(client.create_job("a red circle", tier="batch", steps=60).id)

    done = run(stack, "watch", job.id)

    assert (done.exit_code, f"Job {job.id} is canceled" in done.stderr) == (1, True)
    assert run(stack, "watch", NOBODY).exit_code == 4


def test_a_replay_of_a_reproducible_job_shows_the_same_pixels(stack, client, tmp_path):
    job = client.wait(client.create_job("a blue star", tier="quality", steps=4, n=2, seed=5).id)

    done = run(stack, "replay", job.id, "-o", tmp_path / "again.png")

    assert done.exit_code == 0, done.output
    assert done.stdout.count("the same") == 2
    assert "The same pixels: 2 of 2." in done.stdout
    with Image.open(tmp_path / "again-1.png") as image:
        assert image.size == (128, 128)


def test_an_estimate_tells_price_and_time_and_makes_no_job(stack, client):
    newest = next(client.jobs()).id

    shown = run(stack, "estimate", "a red circle", "--tier", "quality", "-n", 2)
    told = json.loads(
        run(stack, "estimate", "a red circle", "--tier", "quality", "-n", 2, "--json").stdout
    )

    assert shown.exit_code == 0
    assert re.search(r"quality +pocket 1 +128x128", shown.stdout)
    assert (told["can_be_served"], told["n"]) == (True, 2)
    assert run(stack, "estimate", "a red circle", "--steps", 9999).exit_code == 4
    assert next(client.jobs()).id == newest


def test_a_deletion_asks_first_and_leaves_the_job_without_its_prompt(stack, client):
    job = client.wait(client.create_job("a secret circle", tier="fast").id)

    assert run(stack, "delete", job.id, input="n\n").exit_code == 1
    assert client.job(job.id).prompt == "a secret circle"
    assert run(stack, "delete", job.id, "--yes").exit_code == 0

    assert client.job(job.id).prompt is None
    assert "(erased)" in run(stack, "jobs", "--limit", 3).stdout


def test_jobs_are_found_by_time_and_metadata(stack, client):
    job = client.create_job("a red circle", tier="fast", metadata={"set": "summer=1", "page": "2"})

    def found(*options):
        return [each["id"] for each in json.loads(run(stack, "jobs", "--json", *options).stdout)]

    assert found("--metadata", "set=summer=1", "--metadata", "page=2", "--since", "1h") == [job.id]
    assert found("--metadata", "set=summer=1", "--metadata", "page=3") == []
    assert found("--metadata", "set=summer=1", "--until", "1h") == []
    assert found("--metadata", "set=summer=1", "--state", "failed") == []
    assert run(stack, "jobs", "--since", "yesterday").exit_code == 2
    assert run(stack, "jobs", "--metadata", "set").exit_code == 2


def test_instants_without_an_offset_are_utc_wherever_the_command_is_typed(monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        instants = [
            _instant(text, "--since")
            for text in ("2026-11-26", "2026-11-26T18:00", "2026-11-26T18:00+09:00")
        ]
    finally:
        monkeypatch.undo()
        time.tzset()

    assert [at.astimezone(UTC).isoformat() for at in instants] == [
        "2026-11-26T00:00:00+00:00",
        "2026-11-26T18:00:00+00:00",
        "2026-11-26T09:00:00+00:00",
    ]


@pytest.fixture
def gateway(monkeypatch, tmp_path):
    """Run a command on a gateway that makes these jobs, and has the original of a replay."""

    def run_on(*arguments, made, original=None):
        def answer(request):
            if request.url.path.endswith("/images/0"):
                return httpx.Response(200, content=PNG)
            return httpx.Response(
                200, json=original if request.url.path == "/v1/jobs/first" else made
            )

        transport = httpx.MockTransport(answer)
        monkeypatch.setattr(
            Installation,
            "client",
            lambda _: Client("http://gateway.test", "dr_key", transport=transport),
        )
        monkeypatch.chdir(tmp_path)
        return CliRunner().invoke(darkroom, ["--data-dir", str(tmp_path), *arguments])

    return run_on


FAILED = {"state": "failed", "images": [], "failure": {"code": "internal", "detail": "It broke."}}


@pytest.mark.parametrize(
    ("changes", "code", "told"),
    [
        ({}, 0, ""),
        (FAILED, 1, "Job j1 is failed: internal (It broke.)"),
        ({"state": "expired", "images": []}, 1, "Job j1 is expired"),
    ],
)
def test_generate_ends_with_1_and_says_why_when_its_job_does_not_succeed(
    gateway, tmp_path, changes, code, told
):
    done = gateway("generate", "a red circle", made=a_played_job(**changes))

    assert (done.exit_code, told in done.stderr) == (code, True)
    assert (tmp_path / "out.png").exists() == (code == 0)


def with_pixels(digest, **changes):
    job = a_played_job(**changes)
    return job | {"images": [job["images"][0] | {"pixels_sha256": digest}]}


@pytest.mark.parametrize(
    ("original", "made", "code", "told"),
    [
        (with_pixels("a" * 64), with_pixels("a" * 64), 0, "The same pixels: 1 of 1."),
        (
            with_pixels("a" * 64, determinism="reproducible"),
            with_pixels("b" * 64),
            1,
            "The pixels differ.",
        ),
        (with_pixels("a" * 64), with_pixels("b" * 64), 1, "The job's tier is best effort"),
        (
            with_pixels(None, state="failed"),
            with_pixels("b" * 64),
            1,
            "The original is failed: there is nothing to compare with.",
        ),
        (with_pixels("a" * 64), a_played_job(**FAILED), 1, "Job j1 is failed: internal"),
    ],
    ids=["the same", "different", "best effort", "no original", "failed"],
)
def test_replay_ends_with_1_unless_the_pixels_are_the_same(gateway, original, made, code, told):
    done = gateway("replay", "first", original=original | {"id": "first"}, made=made)

    assert (done.exit_code, told in done.output) == (code, True)


UNSERVED = {
    "type": "/problems/model-unserved",
    "title": "Model unserved",
    "status": 503,
    "detail": "No worker serves pocket.",
    "retry_after_s": 5,
}


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["shown", "for programs"])
@pytest.mark.parametrize(
    ("refusal", "code", "told"),
    [
        (None, 0, ""),
        (UNSERVED, 1, "It would be refused now: No worker serves pocket."),
    ],
    ids=["accepted", "refused"],
)
def test_an_estimate_ends_with_1_and_says_why_when_its_job_would_be_refused(
    gateway, options, refusal, code, told
):
    estimated = a_played_job(seed=None, megapixel_steps=0.5, start_deadline_s=30.0, queue=None)
    estimated |= {"can_be_served": refusal is None, "refusal": refusal}

    done = gateway("estimate", "a red circle", *options, made=estimated)

    assert (done.exit_code, done.stderr.strip()) == (code, told)


def test_generate_says_every_field_of_a_job(stack, client, tmp_path):
    said = ["--negative", "blue", "--metadata", "order=7=8", "--metadata", "page=", "--seed", 7]
    out = tmp_path / "x.png"

    done = run(stack, "generate", "a red circle", *said, "--start-deadline", 20, "-o", out)

    assert done.exit_code == 0, done.output
    job = next(client.jobs(metadata={"order": "7=8"}))
    assert (job.negative_prompt, job.seed) == ("blue", 7)
    assert job.metadata == {"order": "7=8", "page": ""}
    assert (job.start_by - job.created_at).total_seconds() == pytest.approx(20, abs=1)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--adapter", "sepia=0.5"], "adapters"),
        (["--start-deadline", "1e9"], "start_deadline_s"),
    ],
)
def test_a_field_that_the_gateway_refuses_is_named(stack, options, why):
    done = run(stack, "estimate", "a red circle", *options)

    assert done.exit_code == 4
    assert why in done.stderr


def test_a_picture_to_be_followed_is_sent_along(stack, tmp_path):
    Image.new("RGB", (128, 128)).save(tmp_path / "edges.png")

    done = run(stack, "estimate", "a red circle", "--control", tmp_path / "edges.png")

    assert (done.exit_code, "control_image" in done.stderr) == (4, True)
    assert "no control network" in done.stderr


@pytest.mark.parametrize(
    ("said", "fields"),
    [
        (["--adapter", "sepia", "--adapter", "ink=-0.5"], [("sepia", None), ("ink", -0.5)]),
        ([], None),
    ],
)
def test_adapters_are_said_with_or_without_their_strength(said, fields):
    asked = []
    click.command()(job_options(lambda **fields: asked.append(fields))).main(
        said, standalone_mode=False
    )

    wanted = fields and [
        {"name": name} | ({"strength": strength} if strength is not None else {})
        for name, strength in fields
    ]
    assert (asked[0]["adapters"], asked[0]["metadata"]) == (wanted, None)


@pytest.mark.parametrize(
    "said",
    [
        ["--adapter", "sepia=much"],
        ["--adapter", "sepia=nan"],
        ["--adapter", "=1"],
        ["--metadata", "x"],
    ],
)
def test_an_entry_that_cannot_be_read_is_refused_before_anything_is_sent(stack, said):
    done = run(stack, "estimate", "a red circle", *said)

    assert (done.exit_code, said[1] in done.stderr) == (2, True)
