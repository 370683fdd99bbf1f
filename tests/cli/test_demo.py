"""The demo's verdict, and that it stops only what it started.

`make demo` itself runs on the real stack.
"""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from cli import demo
from cli.demo import CheckedImage
from cli.installation import Installation
from cli.main import darkroom
from cli.sql import QueryResult
from darkroom_client import Job
from fleet.addresses import Addresses, write_env
from fleet.stack import Stack
from tests.client.test_client import a_job

PIXELS = np.zeros((8, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("failed", "wrong", "is_good"),
    [(0, 0, True), (0, 1, True), (0, 2, False), (1, 0, False)],
    ids=["all is well", "one miss among a dozen", "two misses", "a job failed"],
)
def test_demo_is_good_when_every_job_succeeded_and_nine_images_in_ten_are_right(
    tmp_path, monkeypatch, capsys, failed, wrong, is_good
):
    monkeypatch.setattr(demo, "ask", lambda *_: QueryResult(["event"], [], ""))
    (tmp_path / "demo").mkdir()
    jobs = [
        Job.from_json(a_job(id=f"j{number}", state="failed" if number < failed else "succeeded"))
        for number in range(12)
    ]
    images = [
        CheckedImage(
            job, Path(f"{job.id}.png"), PIXELS, is_right=number >= wrong, summary="no circle"
        )
        for number, job in enumerate(jobs)
    ]

    verdict = demo._report(Installation(tmp_path), jobs, images, auditor_url="postgresql://x")

    shown = capsys.readouterr()
    assert verdict is is_good
    assert (
        f"{12 - failed} of 12 jobs succeeded; "
        f"{12 - wrong} of 12 images show what their prompts say."
    ) in shown.out
    assert shown.err.count("no circle") == wrong


@pytest.mark.parametrize("was_up", [False, True])
@pytest.mark.parametrize(
    ("verdict", "code"), [(True, 0), (False, 1), (None, 130)], ids=["good", "bad", "interrupted"]
)
def test_demo_stops_only_what_it_started_however_it_ends(
    tmp_path, monkeypatch, was_up, verdict, code
):
    def report(*_, **__):
        if verdict is None:
            raise KeyboardInterrupt
        return verdict

    downs = []
    write_env(tmp_path / "env", {**Addresses.fresh().env(), "DARKROOM_API_KEY": "dr_key"})
    monkeypatch.setattr(Stack, "is_up", lambda stack: was_up)
    monkeypatch.setattr(Stack, "up", lambda stack, wait_s, *, on_stage: None)
    monkeypatch.setattr(Stack, "down", lambda stack: downs.append(stack))
    monkeypatch.setattr(demo, "_run", lambda *_: [])
    monkeypatch.setattr(demo, "_report", report)

    done = CliRunner().invoke(darkroom, ["--data-dir", str(tmp_path), "demo"])

    assert (done.exit_code, len(downs)) == (code, not was_up)
