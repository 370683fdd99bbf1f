"""What a worker's images teach of the next ones' cost."""

from dataclasses import replace

import pytest
from sqlalchemy import text

from models import learning
from models.database import transaction
from tests.builders import until
from tests.tasks.conftest import left_at_its_first_checkpoint

QUALITY = {"tier": "quality", "determinism": "reproducible", "bucket_rows": 2, "guidance": 1.0}


@pytest.mark.parametrize(
    ("guidance", "rows", "width_px", "height_px"), [(4.0, 2, 128, 192), (1.0, 1, 128, 128)]
)
def test_a_guided_image_teaches_the_cost_of_one_row_and_not_of_two(
    here, monkeypatch, guidance, rows, width_px, height_px
):
    pool = "taught"  # by nobody else
    monkeypatch.setattr(here.keeper, "identity", replace(here.keeper.identity, pool=pool))
    size = {"width_px": width_px, "height_px": height_px}
    job = here.accept(pool=pool, model="pocket", num_steps=4, guidance=guidance, **size)

    here.render(job).join(timeout=60)

    def learnt():
        with transaction(here.database) as session:
            return learning.cost_of(session, (pool, "pocket", width_px, height_px))

    cost = until(lambda: here.keeper._beat() or learnt(), what="what the heartbeat wrote")
    with transaction(here.database) as session:
        denoise_s = session.scalar(
            text("SELECT denoise_s FROM attempts WHERE job_id = :id"), {"id": job.id}
        )
    assert cost.row_step_s == pytest.approx(denoise_s / (4 * rows))


def test_resumed_image_teaches_by_the_steps_that_were_done_here(here, brake, monkeypatch):
    job, learnt = here.accept(**QUALITY, num_steps=8), []
    monkeypatch.setattr(here.keeper, "learn", lambda key, **seen: learnt.append(seen["row_steps"]))
    left_at_its_first_checkpoint(here, brake, job)
    assert learnt == []

    here.render(job).join(timeout=60)

    with transaction(here.database) as session:
        query = text("SELECT steps, resumed_steps FROM attempts WHERE job_id = :id AND attempt = 2")
        steps, resumed_steps = session.execute(query, {"id": job.id}).one()
    assert resumed_steps > 0
    assert learnt == [steps]
