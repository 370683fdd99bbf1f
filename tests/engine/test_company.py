"""An image does not depend on its neighbours.

To the bit when reproducible, to a rounding of the last level otherwise.
"""

import random

import numpy as np
import pytest
import torch
from engine_builders import SAMPLERS, a_request, reproducible

from engine.errors import ImageCanceled

# Best effort: the same sums in another order differ by some 1e-6 of a 0..1 image per forward; one
# of 255 levels is the least that can be told apart in bytes, and a random network has no cause to
# amplify it further in so few steps.
TOLERATED_LEVELS = 1


@pytest.fixture
def latents(engine, monkeypatch) -> dict[str, torch.Tensor]:
    """The last latents of every image by its id.

    Stricter than pixels, where rounding hides the last bits.
    """
    seen = {}
    decode = engine._runner.decode

    def watched(image):
        seen[image.id] = image.tensors.latents.clone()
        return decode(image)

    monkeypatch.setattr(engine._runner, "decode", watched)
    return seen


def differs_by(one, other) -> int:
    return int(np.abs(one.pixels.astype(int) - other.pixels.astype(int)).max())


def after(step, submit):
    """An on_event that calls `submit` once, when its image has taken `step` steps.

    Neighbours join in mid-flight.
    """
    done = []

    def on_event(event):
        if getattr(event, "step", None) == step and not done:
            done.append(True)
            submit()

    return on_event


def test_strangers_share_forwards(engine):
    handles = []

    def company():
        handles.append(
            engine.submit(a_request("b", num_steps=3, guidance=1.0, sampler="euler_a", seed=2))
        )
        handles.append(
            engine.submit(a_request("c", num_steps=9, guidance=7.5, sampler="unipc", seed=3))
        )

    first = engine.submit(a_request("a", num_steps=6), after(1, company)).result(60)
    records = [first.record, *(handle.result(60).record for handle in handles)]

    assert [record.max_images for record in records] == [3, 3, 3]
    assert [record.max_rows for record in records] == [5, 5, 5]
    # c ends alone: 4 of its 9 steps
    assert [record.shared_forwards for record in records] == [5, 3, 5]
    assert [record.forwards for record in records] == [6, 3, 9]


def test_a_newcomer_joins_the_very_next_forward(engine):
    late = []

    early = engine.submit(
        a_request("early", num_steps=6),
        after(2, lambda: late.append(engine.submit(a_request("late")))),
    ).result(60)

    assert early.record.shared_forwards == 4
    assert late[0].result(60).record.shared_forwards == 4


def test_images_of_one_job_are_no_neighbours(engine):
    second = []

    def another():
        second.append(engine.submit(a_request("b", group="one job")))

    first = engine.submit(a_request("a", group="one job"), after(1, another)).result(60)
    second[0].result(60)

    assert first.record.max_images == 2
    assert first.record.shared_forwards == 0


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "dpmpp_2m_sde"])
def test_a_reproducible_image_is_the_same_to_the_bit_alone_and_in_company(
    engine, latents, sampler, guidance
):
    request = reproducible("same", sampler=sampler, guidance=guidance, num_steps=6)
    alone = engine.submit(request).result(60)
    expected = latents["same"]
    neighbours = []

    def join():
        neighbours.append(
            engine.submit(reproducible("twin", seed=99, num_steps=3, sampler="unipc"))
        )
        neighbours.append(engine.submit(a_request("filler", guidance=1.0, num_steps=2)))

    accompanied = engine.submit(request, after(2, join)).result(60)
    for neighbour in neighbours:
        neighbour.result(60)

    assert alone.record.shared_forwards == 0
    # the neighbours joined after step 2 and left before the last
    assert accompanied.record.shared_forwards == 3
    assert alone.record.bucket_rows == accompanied.record.bucket_rows == 8
    assert alone.record.fingerprint == accompanied.record.fingerprint
    assert torch.equal(expected, latents["same"])
    assert np.array_equal(alone.pixels, accompanied.pixels)


def test_reproducible_images_stay_the_same_while_strangers_join_leave_and_cancel_at_random(
    engine, latents
):
    dice = random.Random(5)
    wishes = [
        reproducible(
            f"wish {n}",
            seed=n,
            num_steps=dice.randint(2, 9),
            sampler=dice.choice(SAMPLERS),
            guidance=dice.choice([1.0, 3.0, 7.5]),
            bucket_rows=dice.choice([4, 8]),
            rank=dice.randint(0, 2),
        )
        for n in range(16)
    ]
    alone = {wish.id: engine.submit(wish).result(60).pixels for wish in wishes}
    expected = dict(latents)

    handles, strangers = [], []

    def stir(_event):
        """Called at every event of every image: lets the next one in at a step nobody planned."""
        if wishes and dice.random() < 0.3:
            handles.append(engine.submit(wishes.pop(), stir))
        if len(strangers) < 24 and dice.random() < 0.3:
            strangers.append(
                engine.submit(
                    a_request(
                        f"stranger {len(strangers)}",
                        seed=len(strangers),
                        num_steps=dice.randint(1, 6),
                    )
                )
            )
        if strangers and dice.random() < 0.1:
            dice.choice(strangers).cancel()

    handles.append(engine.submit(wishes.pop(), stir))
    finished = []
    while handles or wishes:
        if not handles:
            handles.append(engine.submit(wishes.pop(), stir))
        finished.append(handles.pop(0).result(60))
    for stranger in strangers:
        try:
            stranger.result(60)
        except ImageCanceled:
            continue

    assert len(finished) == 16
    assert sum(image.record.shared_forwards for image in finished) > 30
    assert [
        image.request.id
        for image in finished
        if not torch.equal(latents[image.request.id], expected[image.request.id])
    ] == []
    assert all(np.array_equal(image.pixels, alone[image.request.id]) for image in finished)


def test_a_best_effort_image_in_company_is_close_to_what_it_is_alone(engine):
    alone = engine.submit(a_request("a", num_steps=8)).result(60)
    neighbours = []

    def join():
        neighbours.extend(
            engine.submit(a_request(f"n{seed}", seed=seed, num_steps=8)) for seed in range(3)
        )

    accompanied = engine.submit(a_request("a", num_steps=8), after(1, join)).result(60)
    for neighbour in neighbours:
        neighbour.result(60)

    assert accompanied.record.shared_forwards == 7
    assert differs_by(alone, accompanied) <= TOLERATED_LEVELS


def test_a_bucket_shares_the_device_by_used_rows_and_counts_no_padding(engine):
    record = engine.submit(reproducible("a")).result(60).record

    assert (record.max_rows, record.mean_rows) == (2, 2)
    assert record.fingerprint_facts["bucket_rows"] == 8
    assert record.fingerprint != engine.fingerprint("tiny").sha256
