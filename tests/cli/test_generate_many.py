"""generate --from: many prompts, interrupted in every way, and gone on with; on the real stack."""

import asyncio
import contextlib
import hashlib
import itertools
import json
import re
import signal
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from cli.generate import _fingerprint
from cli.main import darkroom
from cli.many import PromptRunner
from cli.prompts import decoded, read
from cli.runs import AnotherRun, Run
from cli.sql import ask
from darkroom_client import Client, ProblemError, Unreachable
from tests.builders import until
from tests.cli.terminal import Terminal, piped

NUMBERS = itertools.count(1)


@pytest.fixture
def prompts(tmp_path):
    """Six prompts that nobody else has, in a file."""
    lines = [f"a red circle number {next(NUMBERS)} of {tmp_path.name}" for _ in range(6)]
    (tmp_path / "prompts.txt").write_text("\n".join(lines) + "\n")
    return lines


@pytest.fixture
def jobs_of(client: Client):
    def jobs_of(prompts):
        return [
            job
            for job in itertools.islice(client.jobs(page_size=100), 100)
            if job.prompt in prompts
        ]

    return jobs_of


GENERATE = ("generate", "--from", "prompts.txt", "-o", "images")


def started(stack, tmp_path, *options, on=piped):
    """The command over the file of prompts, in a process of its own."""
    return on(stack.data_dir, *GENERATE, *options, cwd=tmp_path)


@pytest.fixture(autouse=True)
def _no_installation_of_the_callers(monkeypatch):
    for name in ("DARKROOM_URL", "DARKROOM_API_KEY", "DARKROOM_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)


def run(stack, tmp_path, *options):
    """The command in this process, to its end."""
    arguments = [*GENERATE, *map(str, options)]
    with contextlib.chdir(tmp_path):
        done = CliRunner().invoke(
            darkroom, ["--data-dir", str(stack.data_dir), *arguments], env={"COLUMNS": "110"}
        )
    return done.exit_code, done.stdout, done.stderr


def noted(tmp_path):
    try:
        lines = json.loads((tmp_path / "images" / ".darkroom-run.json").read_text())["lines"]
    except FileNotFoundError:
        return {}
    return {number: facts["job"] for number, facts in lines.items() if facts.get("job")}


def files(tmp_path):
    return sorted(
        path.name for path in (tmp_path / "images").iterdir() if not path.name.startswith(".")
    )


def assert_all_is_there(tmp_path, jobs, prompts):
    """One job for each prompt, each image in its file, byte for byte."""
    assert sorted(job.prompt for job in jobs) == sorted(prompts)
    assert len(files(tmp_path)) == len(prompts)
    for job in jobs:
        path = tmp_path / "images" / f"{prompts.index(job.prompt) + 1}-{job.seed}-0.png"
        assert hashlib.sha256(path.read_bytes()).hexdigest() == job.images[0].content_sha256


def test_every_line_becomes_files_under_its_number_and_one_that_cannot_is_named(stack, tmp_path):
    job_bodies = [
        "a red circle",
        "",
        '{"prompt": "a blue star", "n": 2, "seed": 40, "output_format": "webp"}',
        '{"prompt": "x", "steps": 9999}',
    ]
    (tmp_path / "prompts.txt").write_text("\n".join(job_bodies))

    code, out, err = run(stack, tmp_path, "--tier", "fast", "--seed", 7)

    assert code == 1
    assert files(tmp_path) == ["1-7-0.png", "3-40-0.webp", "3-40-1.webp"]
    assert "2 of 3 prompts done: 3 images in images" in out
    assert "line 4 (x): refused: Invalid image request: steps must be from 1 to 20" in err


def test_interrupted_and_run_again_nothing_is_asked_for_twice(stack, tmp_path, prompts, jobs_of):
    process = started(stack, tmp_path, "--tier", "batch", "--parallel", 3)
    until(lambda: len(noted(tmp_path)) >= 3, within_s=60)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    before = noted(tmp_path)

    code, out, _ = run(stack, tmp_path, "--tier", "batch", "--parallel", 3)

    assert process.returncode == 130
    assert "The same command again goes on from here." in err
    assert (code, 3 <= len(before) < 6) == (0, True)
    assert before.items() <= noted(tmp_path).items()
    assert "6 of 6 prompts done: 6 images in images" in out
    assert_all_is_there(tmp_path, jobs_of(prompts), prompts)


def test_killed_at_any_instant_and_run_again_nothing_is_asked_for_twice(
    stack, tmp_path, prompts, jobs_of
):
    for _ in range(3):
        process = started(stack, tmp_path, "--tier", "fast", "--parallel", 2)
        before = len(jobs_of(prompts))
        until(lambda: len(jobs_of(prompts)) > before or process.poll() is not None, within_s=60)  # noqa: B023
        process.kill()
        process.wait()

    assert run(stack, tmp_path, "--tier", "fast", "--parallel", 2)[0] == 0

    assert_all_is_there(tmp_path, jobs_of(prompts), prompts)


def test_run_again_only_what_is_missing_or_broken_is_fetched(stack, tmp_path, prompts, jobs_of):
    assert run(stack, tmp_path, "--tier", "fast")[0] == 0
    names = files(tmp_path)
    (tmp_path / "images" / names[0]).unlink()
    (tmp_path / "images" / names[1]).write_bytes(b"broken")
    kept = (tmp_path / "images" / names[2]).stat().st_mtime_ns

    code, out, _ = run(stack, tmp_path, "--tier", "fast")

    assert (code, "6 images in images, 4 of them there already" in out) == (0, True)
    assert (tmp_path / "images" / names[2]).stat().st_mtime_ns == kept
    assert_all_is_there(tmp_path, jobs_of(prompts), prompts)


def test_a_folder_keeps_to_its_prompts_and_options_until_told_otherwise(
    stack, tmp_path, prompts, jobs_of
):
    (tmp_path / "prompts.txt").write_text(prompts[0])
    assert run(stack, tmp_path, "--tier", "fast")[0] == 0

    other = run(stack, tmp_path, "--tier", "fast", "--steps", 3)
    fresh = run(stack, tmp_path, "--tier", "fast", "--steps", 3, "--fresh")

    assert (other[0], "holds a run of other prompts or options" in other[2], fresh[0]) == (
        2,
        True,
        0,
    )
    assert sorted(job.steps for job in jobs_of(prompts)) == [3, 4]


def test_on_a_terminal_jobs_are_seen_under_way_and_a_second_ctrl_c_cancels_them(
    stack, tmp_path, prompts, jobs_of
):
    options = ["--tier", "batch", "--steps", 60, "--parallel", 2]
    terminal = started(stack, tmp_path, *options, on=Terminal)
    terminal.read_until("0 of 6 done", "2 under way", prompts[0][:30])
    until(lambda: len(jobs_of(prompts)) == 2, within_s=60)
    terminal.press_ctrl_c()
    terminal.read_until("2 jobs under way; Ctrl-C again within 2 s to cancel")
    terminal.press_ctrl_c()

    assert terminal.end() == 130

    assert "2 jobs canceled" in terminal.shown
    assert [job.state for job in jobs_of(prompts)] == ["canceled", "canceled"]
    assert noted(tmp_path) == {}


def test_on_a_terminal_one_ctrl_c_leaves_the_jobs_to_go_on(stack, tmp_path, prompts, jobs_of):
    terminal = started(stack, tmp_path, "--tier", "fast", "--parallel", 2, on=Terminal)
    terminal.read_until("2 under way")
    until(lambda: len(noted(tmp_path)) >= 2, within_s=60)
    terminal.press_ctrl_c()

    assert terminal.end() == 130

    assert re.search(r"Interrupted; \d jobs? left under way", terminal.shown)
    until(lambda: all(job.state == "succeeded" for job in jobs_of(prompts)), within_s=60)


def test_lines_that_failed_are_asked_for_again_as_new_jobs_when_that_is_wanted(
    stack, tmp_path, prompts, jobs_of
):
    (tmp_path / "prompts.txt").write_text("\n".join(prompts[:2]))
    assert run(stack, tmp_path, "--tier", "fast")[0] == 0
    [failed] = jobs_of(prompts[:1])
    ask(
        stack.env["MIGRATION_DATABASE_URL"],
        "UPDATE jobs SET state = 'failed', failure_code = 'internal' WHERE id = %s",
        [failed.id],
    )

    as_before = run(stack, tmp_path, "--tier", "fast")
    again = run(stack, tmp_path, "--tier", "fast", "--retry-failed")

    assert (as_before[0], f"line 1 ({prompts[0][:40]}): failed: internal" in as_before[2]) == (
        1,
        True,
    )
    assert (again[0], "2 of 2 prompts done" in again[1]) == (0, True)
    assert [len(jobs_of([prompt])) for prompt in prompts[:2]] == [2, 1]


def test_a_line_has_one_key_in_all_its_runs_until_it_begins_again(tmp_path):
    def opened():
        return Run.opened(tmp_path, source=b"a red circle", options={"tier": "fast"}, fresh=False)

    first = opened()
    keys = [first.key(1), first.key(2), opened().key(1)]
    first.note(1, job="j1")
    first.begin_again(1)
    first.save()

    assert (keys[0] == keys[2], keys[0] == keys[1]) == (True, False)
    assert opened().key(1) not in keys
    assert opened().key(2) == keys[1]
    assert opened().of(1)["job"] is None


def test_a_run_knows_the_pictures_it_starts_from_by_their_content(tmp_path):
    (tmp_path / "cat.png").write_bytes(b"cat")
    (tmp_path / "same.png").write_bytes(b"cat")
    cat, same = (
        _fingerprint({"init_image": tmp_path / name, "tier": "fast"})
        for name in ("cat.png", "same.png")
    )
    Run.opened(tmp_path, source=b"a red circle", options=cat, fresh=False)
    (tmp_path / "cat.png").write_bytes(b"dog")

    assert same == cat
    with pytest.raises(AnotherRun):
        Run.opened(
            tmp_path,
            source=b"a red circle",
            options=_fingerprint({"init_image": tmp_path / "cat.png", "tier": "fast"}),
            fresh=False,
        )


def a_runner(tmp_path, wait):
    """One without lines, whose board shows with `wait` why no job is accepted."""
    board = SimpleNamespace(wait=wait)
    return PromptRunner(None, None, [], {}, tmp_path, board, retry_failed=False)


def a_refusal(status, retry_after_s=None):
    return ProblemError(status=status, type="t", title="No", retry_after_s=retry_after_s)


@pytest.mark.parametrize(
    ("error", "pause_s"),
    [
        (a_refusal(429, 7.0), 7.0),  # a quota that refills
        (a_refusal(503, 5.0), 5.0),  # a full queue
        (Unreachable("away"), 1.0),
        (a_refusal(429), None),  # one that does not
        (a_refusal(422, 7.0), None),
    ],
    ids=["quota", "saturated", "unreachable", "spent", "invalid"],
)
def test_a_run_waits_for_what_time_cures_and_says_why(tmp_path, monkeypatch, error, pause_s):
    answers, told, pauses = [error, "the job"], [], []

    async def ask_once():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def sleep(seconds):
        pauses.append(seconds)

    monkeypatch.setattr("cli.many.asyncio.sleep", sleep)
    many = a_runner(tmp_path, told.append)

    if pause_s is None:
        with pytest.raises(ProblemError):
            asyncio.run(many._patiently(ask_once))
    else:
        assert asyncio.run(many._patiently(ask_once)) == "the job"
        assert (pauses, len(told)) == ([pause_s], 1)


def test_a_run_ends_when_its_gateway_is_away_for_too_long(tmp_path, monkeypatch):
    now = 1000.0

    async def nobody():
        raise Unreachable("away")

    async def sleep(seconds):
        nonlocal now
        now += seconds

    monkeypatch.setattr("cli.many.asyncio.sleep", sleep)
    monkeypatch.setattr("cli.many.time", SimpleNamespace(monotonic=lambda: now))
    many = a_runner(tmp_path, lambda why: None)

    with pytest.raises(Unreachable):
        asyncio.run(many._patiently(nobody))

    assert now - 1000 == pytest.approx(120, abs=2)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"prompt": ', "line 1 begins like JSON but cannot be read"),
        ('ok\n{"steps": 3}', 'line 2 has no "prompt"'),
        (
            '["a red circle",\n"a blue',
            "line 2: the file begins like a JSON list but cannot be read",
        ),
        ("a red circle\n[a blue star]", "line 2 begins like JSON but cannot be read"),
        ('["a red circle", 7]', "entry 2 is neither a text nor an object"),
        ('{"prompt": "x", "idempotency_key": "k"}', '"idempotency_key" is not a field of a job'),
        (b"\xff", "decode"),
        ("a red circle".encode("utf-16"), "line 1 is not UTF-8"),
    ],
    ids=[
        "no JSON",
        "no prompt",
        "no list",
        "no list in a line",
        "a number",
        "a word of ours",
        "no text",
        "UTF-16",
    ],
)
def test_a_file_that_is_no_file_of_prompts_is_refused_before_anything_is_asked_for(
    stack, tmp_path, text, why
):
    (tmp_path / "prompts.txt").write_bytes(text if isinstance(text, bytes) else text.encode())

    code, _, err = run(stack, tmp_path)

    assert (code, why in err) == (2, True)
    assert not (tmp_path / "images").exists()


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffa red circle of BOM\r\n\ufeffa blue star of BOM\r\n",
        '\ufeff{"prompt": "a red circle of BOM"}\n{"prompt": "a blue star of BOM"}\n',
        '["a red circle of BOM", {"prompt": "a blue star of BOM"}]',
        '[\n  {"prompt": "a red circle of BOM"},\n  "a blue star of BOM"\n]\n',
        '"a red circle of BOM"\n"a blue star of BOM"\n',
    ],
    ids=["text with marks", "JSON lines with a mark", "a list", "a list on lines", "JSON strings"],
)
def test_prompts_are_what_the_file_says_however_it_was_saved(text):
    assert [line.prompt for line in read(decoded(text.encode()))] == [
        "a red circle of BOM",
        "a blue star of BOM",
    ]


def test_a_prompt_may_begin_with_a_quotation():
    assert [line.prompt for line in read('"Hello" on a wall\n"this" and "that"')] == [
        '"Hello" on a wall',
        '"this" and "that"',
    ]


def test_fields_of_a_job_stand_in_a_list_too_and_a_refusal_names_the_field(stack, tmp_path):
    job_bodies = [
        {"prompt": "a blue star", "seed": 40, "steps": 2},
        {"prompt": "x", "seed": "six", "stepz": 3},
    ]
    (tmp_path / "prompts.txt").write_text(json.dumps(job_bodies), encoding="utf-8-sig")

    code, _, err = run(stack, tmp_path, "--tier", "fast")

    assert (code, files(tmp_path)) == (1, ["1-40-0.png"])
    assert "line 2 (x): refused: Invalid image request" in err
    assert "/seed: Input should be a valid integer" in err
    assert "/stepz: There is no such field (accepted: prompt," in err


def test_lines_that_the_model_does_not_read_to_their_end_are_told(stack, tmp_path):
    (tmp_path / "prompts.txt").write_text(
        "a red circle\na blue star" + ", very detailed picture" * 20
    )

    code, _, err = run(stack, tmp_path, "--tier", "fast")

    assert code == 0
    assert "line 2 (a blue star, very detailed" in err
    assert "the model reads the first 22, and the rest has no effect" in err
