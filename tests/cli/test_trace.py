"""trace, logs --job: one job as all processes have seen it."""

import json
import uuid

import httpx
import pytest
from click.testing import CliRunner

from cli.main import darkroom
from cli.sql import ask
from tests.builders import until

TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
PROMPT = "a large violet circle that nobody else asks for"


@pytest.fixture(autouse=True)
def _no_installation_of_the_callers(monkeypatch):
    for name in ("DARKROOM_URL", "DARKROOM_API_KEY", "DARKROOM_DATA_DIR", "FLEET_FILE"):
        monkeypatch.delenv(name, raising=False)


def run(stack, *arguments):
    return CliRunner().invoke(darkroom, ["--data-dir", str(stack.data_dir), *map(str, arguments)])


@pytest.fixture(scope="module")
def job(stack, client) -> dict:
    """A job with two images, and what its request called itself."""
    request_id = f"shop-{uuid.uuid4().hex[:8]}"
    headers = {
        "Authorization": f"Bearer {stack.env['DARKROOM_API_KEY']}",
        "X-Request-Id": request_id,
        "traceparent": TRACEPARENT,
    }
    body = {"prompt": PROMPT, "tier": "quality", "steps": 4, "n": 2, "seed": 5}
    url = f"{stack.env['DARKROOM_URL']}/v1/jobs"
    accepted = httpx.post(url, json=body, headers=headers, trust_env=False)
    assert accepted.headers["X-Request-Id"] == request_id
    client.wait(accepted.json()["id"])
    return {"id": accepted.json()["id"], "request_id": request_id}


def test_trace_tells_each_part_of_a_job_with_its_time_within_the_job_s(stack, job):
    told = json.loads(run(stack, "trace", "--json", job["id"]).stdout)

    assert (told["request_id"], told["traceparent"]) == (job["request_id"], TRACEPARENT)
    names = [span["name"] for span in told["spans"]]
    assert names == ["job", "wait in line", "attempt 1", "store image 0", "store image 1"]
    whole, line, attempt, *stored = told["spans"]
    assert (whole["state"], whole["tier"], whole["images"]) == ("succeeded", "quality", 2)
    assert line["start"] == whole["start"]
    assert line["end"] == attempt["start"]
    assert (attempt["outcome"], attempt["steps"]) == ("rendered", 8)
    assert min(attempt[name] for name in ("wait_s", "encode_s", "denoise_s", "decode_s")) > 0
    for span in stored:
        assert attempt["start"] < span["start"] < span["end"] <= whole["end"]


def test_trace_is_drawn_as_bars_on_one_axis(stack, job):
    done = run(stack, "trace", job["id"])

    lines = done.stdout.splitlines()
    assert done.exit_code == 0
    assert [line.split("  ")[0].strip() or "nothing" for line in lines if "job" in line]
    assert all("█" in line for line in lines if "attempt" in line or "store image" in line)
    assert TRACEPARENT in done.stderr


def test_trace_of_no_job_is_refused(stack):
    done = run(stack, "trace", uuid.uuid4())

    assert (done.exit_code, "There is no job" in done.stderr) == (4, True)


def test_logs_of_a_job_are_those_of_all_processes_in_the_order_of_time(stack, job):
    def lines() -> list[dict]:
        done = run(stack, "logs", "--job", job["id"])
        assert done.exit_code == 0
        return [json.loads(line.partition("│ ")[2]) for line in done.stdout.splitlines()]

    until(lambda: any(line["event"] == "job_succeeded" for line in lines()), within_s=30)

    told = lines()
    assert [line["timestamp"] for line in told] == sorted(line["timestamp"] for line in told)
    assert {line.get("request_id") for line in told if line["event"] == "job_succeeded"} == {
        job["request_id"]
    }
    assert {line.get("trace_id") for line in told if line["event"] == "job_succeeded"} == {
        TRACEPARENT.split("-")[1]
    }
    accepted = [line for line in told if line["event"] == "job_accepted"]
    assert [line["job_id"] for line in accepted] == [job["id"]]


def test_no_process_logs_what_a_tenant_has_written(stack, job):
    for file in (stack.data_dir / "logs").glob("*.log"):
        assert PROMPT not in file.read_text(), file.name


def test_job_keeps_what_was_promised_when_it_was_accepted(stack, job):
    query = "SELECT eta_p90_s FROM jobs WHERE id::text = %s"
    answer = ask(stack.env["MIGRATION_DATABASE_URL"], query, [job["id"]])
    assert answer.rows[0][0] > 0


def test_job_history_names_the_request_that_made_a_job(stack, job):
    query = "SELECT request_id, traceparent FROM job_history WHERE job_id::text = %s"
    answer = ask(stack.env["AUDITOR_DATABASE_URL"], query, [job["id"]])
    assert answer.rows == [(job["request_id"], TRACEPARENT)]
