"""Snapshots, forks, ranks and previews, as callers of the engine meet them."""

import io
import os
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from engine_builders import ALWAYS, SAMPLERS, a_request, a_spec, reproducible
from PIL import Image

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import (
    DeadlinePassed,
    EngineStopped,
    ImageCanceled,
    SnapshotRefused,
    UnsupportedRequest,
)
from engine.events import Failed, Finished, Parked, Previewed, Resumed, Started, Stepped
from engine.inflight import RenderState
from engine.request import Fork, Picture
from engine.snapshots import peek

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def elsewhere(checkpoint):
    """Another engine, as on another worker of the same kind."""
    with Engine(
        EngineConfig(growth_ceiling=ALWAYS, max_batch_rows=8), [a_spec(checkpoint)]
    ) as engine:
        yield engine


def snapshots_at_every_step(engine, request):
    """The finished image and {step: snapshot}.

    Snapshots are asked for from the engine's own thread, so each is of exactly its step.
    """
    asked = {}

    def on_event(event):
        if isinstance(event, Started):
            asked[0] = engine.snapshot(request.id)
        elif isinstance(event, Stepped):
            asked[event.step] = engine.snapshot(request.id)

    finished = engine.submit(request, on_event).result(60)
    blobs = {}
    for step, future in asked.items():
        if future.exception(30) is None:
            blobs[step] = future.result()
    return finished, blobs


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_goes_on_elsewhere_at_any_step_with_the_same_bits(engine, elsewhere, sampler):
    request = reproducible("moved", sampler=sampler, num_steps=4)
    expected, blobs = snapshots_at_every_step(engine, request)

    resumed = {
        step: elsewhere.restore(blob, request=replace(request, id=f"from {step}")).result(60)
        for step, blob in blobs.items()
    }

    assert sorted(resumed) == [0, 1, 2, 3, 4]
    assert [
        step for step, image in resumed.items() if not np.array_equal(image.pixels, expected.pixels)
    ] == []
    # nothing is denoised twice
    assert [image.record.forwards for image in resumed.values()] == [4, 3, 2, 1, 0]


@pytest.mark.parametrize("every", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_a_fresh_process_resumes_every_sampler_at_any_step_with_the_same_bits(
    engine, checkpoint, tmp_path, every
):
    expected = {}
    for number, sampler in enumerate(SAMPLERS):
        request = reproducible(sampler, sampler=sampler, num_steps=4)
        finished, blobs = snapshots_at_every_step(engine, request)
        for step, blob in blobs.items():
            if (number + step) % every == 0:
                (tmp_path / f"{sampler}.{step}").write_bytes(blob)
                expected[f"{sampler}.{step}"] = finished.pixels
    script = f"""
import sys, numpy as np
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from engine_builders import a_spec
from engine.config import EngineConfig
from engine.engine import Engine
with Engine(EngineConfig(max_batch_rows=8), [a_spec(Path({str(checkpoint)!r}))]) as engine:
    for blob in sorted(Path({str(tmp_path)!r}).iterdir()):
        np.save(f"{{blob}}.npy", engine.restore(blob.read_bytes()).result(60).pixels)
"""

    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=REPO,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=300,
    )

    assert run.returncode == 0, run.stderr
    assert len(expected) == len(SAMPLERS) * 5 / every
    assert [
        name
        for name, pixels in expected.items()
        if not np.array_equal(np.load(tmp_path / f"{name}.npy"), pixels)
    ] == []


def test_a_restored_image_says_so_and_keeps_its_place(engine, elsewhere):
    _, blobs = snapshots_at_every_step(engine, reproducible("a", num_steps=4))
    events = []

    elsewhere.restore(blobs[3], events.append).result(60)

    assert [type(event) for event in events[1:]] == [Resumed, Stepped, Finished]
    assert events[1].step == 3
    assert (events[2].step, events[2].num_steps) == (4, 4)
    assert (peek(blobs[3]).step, peek(blobs[3]).num_steps) == (3, 4)


def test_a_snapshot_of_an_image_that_has_not_started_starts_it(engine, elsewhere):
    release = threading.Event()
    first = engine.submit(
        a_request("first"), lambda event: release.wait(30) if isinstance(event, Stepped) else None
    )
    second = engine.submit(reproducible("second"))
    asked = engine.snapshot("second")
    release.set()

    blob = asked.result(30)

    assert peek(blob).step == 0
    assert np.array_equal(elsewhere.restore(blob).result(60).pixels, second.result(60).pixels)
    first.result(60)


def test_a_snapshot_is_refused_where_a_bit_could_differ(engine, checkpoint):
    _, blobs = snapshots_at_every_step(engine, reproducible("a", num_steps=3))

    with (
        Engine(EngineConfig(attention="math"), [a_spec(checkpoint)]) as other,
        pytest.raises(SnapshotRefused, match="auto there, math here"),
    ):
        other.restore(blobs[1])


def test_a_snapshot_is_refused_for_another_request(engine, elsewhere):
    _, blobs = snapshots_at_every_step(engine, reproducible("a", num_steps=3))

    with pytest.raises(SnapshotRefused, match="another request"):
        elsewhere.restore(blobs[1], request=reproducible("a", num_steps=3, prompt="a green star"))


def test_a_damaged_snapshot_is_refused_and_nothing_is_taken(engine, elsewhere):
    _, blobs = snapshots_at_every_step(engine, reproducible("a", num_steps=3))
    damaged = bytearray(blobs[1])
    damaged[len(damaged) // 2] ^= 1

    with pytest.raises(SnapshotRefused):
        elsewhere.restore(bytes(damaged))
    assert elsewhere.stats()["waiting"] == elsewhere.stats()["inflight"] == 0


def test_there_is_no_snapshot_of_an_image_that_has_ended(engine):
    handle = engine.submit(a_request("a"))
    handle.result(60)

    with pytest.raises(SnapshotRefused, match="no longer"):
        handle.snapshot(30)


def test_a_stopped_engine_gives_no_snapshot(checkpoint):
    engine = Engine(EngineConfig(max_batch_rows=2), [a_spec(checkpoint, sizes=((64, 64),))])
    engine.start()
    engine.stop()

    for ask in (engine.snapshot, engine.withdraw):
        with pytest.raises(EngineStopped):
            ask("a").result(30)


# --- withdrawing ----------------------------------------------------------------------------------


def test_a_snapshot_asked_for_as_the_engine_stops_is_answered(checkpoint):
    engine = Engine(EngineConfig(), [a_spec(checkpoint)])
    engine.start()
    reached, go = threading.Event(), threading.Event()

    def on_event(event):
        if isinstance(event, Stepped) and event.step == 1:
            reached.set()
            assert go.wait(30)

    engine.submit(a_request("a", num_steps=500), on_event)
    assert reached.wait(30)
    asked = [engine.snapshot("a"), engine.withdraw("a")]
    stopping = threading.Thread(target=engine.stop)
    stopping.start()
    while engine.is_running:
        time.sleep(0.001)
    go.set()
    stopping.join(30)

    for future in asked:
        with pytest.raises(SnapshotRefused, match="no longer"):
            future.result(30)


@pytest.mark.parametrize("step", [0, 1, 3, 5])
def test_a_withdrawn_image_ends_here_at_the_step_it_goes_on_from_elsewhere_with_the_same_bits(
    engine, elsewhere, step
):
    expected = engine.submit(reproducible("a", num_steps=5)).result(60)
    events, asked = [], []

    def on_event(event):
        events.append(event)
        if (
            isinstance(event, Started if step == 0 else Stepped)
            and getattr(event, "step", 0) == step
        ):
            asked.append(engine.withdraw("a"))

    handle = engine.submit(reproducible("a", num_steps=5), on_event)
    with pytest.raises(ImageCanceled):
        handle.result(60)

    blob = asked[0].result(30)
    assert peek(blob).step == handle.progress().step == step
    assert isinstance(events[-1].error, ImageCanceled)
    assert [event.step for event in events if isinstance(event, Stepped)] == list(
        range(1, step + 1)
    )
    moved = elsewhere.restore(blob).result(60)
    assert moved.record.forwards == 5 - step
    assert np.array_equal(moved.pixels, expected.pixels)


def test_when_the_snapshot_is_there_the_image_has_ended_and_its_id_is_free(engine):
    expected, again = engine.submit(reproducible("a", num_steps=4)).result(60), Future()

    def on_event(event):
        if isinstance(event, Stepped) and event.step == 2:
            asked = engine.withdraw("a")
            asked.add_done_callback(lambda asked: again.set_result(engine.restore(asked.result())))

    with pytest.raises(ImageCanceled):
        engine.submit(reproducible("a", num_steps=4), on_event).result(60)

    assert np.array_equal(again.result(30).result(60).pixels, expected.pixels)


def test_an_image_of_which_there_is_no_snapshot_is_left_in_flight(engine):
    engine.submit(a_request("origin", owner="acme", num_steps=4, keep_steps=(2,))).result(60)
    go = queued_behind(engine, 1)
    fork = engine.submit(a_request("fork", owner="acme", num_steps=4, fork=Fork("origin", 2)))
    asked = engine.withdraw("fork")
    go()

    with pytest.raises(SnapshotRefused, match="has not started"):
        asked.result(30)
    assert fork.result(60).record.forwards == 2


def test_an_image_that_has_ended_meanwhile_cannot_be_withdrawn(engine):
    asked = []

    image = engine.submit(
        a_request("a"),
        lambda event: asked.append(engine.withdraw("a")) if isinstance(event, Finished) else None,
    )

    assert image.result(60)
    with pytest.raises(SnapshotRefused, match="no longer"):
        asked[0].result(30)


def test_an_image_canceled_before_it_could_be_withdrawn_ends_once_and_without_a_snapshot(engine):
    events = []
    reached, go = threading.Event(), threading.Event()

    def on_event(event):
        events.append(event)
        if isinstance(event, Stepped) and event.step == 1:
            reached.set()
            assert go.wait(30)

    handle = engine.submit(a_request("a"), on_event)
    assert reached.wait(30)
    handle.cancel()
    asked = engine.withdraw("a")
    go.set()

    with pytest.raises(SnapshotRefused, match="no longer"):
        asked.result(30)
    with pytest.raises(ImageCanceled):
        handle.result(60)
    assert [type(event) for event in events[3:]] == [Failed]
    assert engine.submit(a_request("another")).result(60)


def test_a_restored_image_lets_go_of_its_snapshot_once_begun(engine, elsewhere, monkeypatch):
    _, blobs = snapshots_at_every_step(engine, reproducible("a", num_steps=4))
    family = elsewhere._checkpoints["tiny"].family
    restore, states, left = family.restore, [], []

    def restoring(image, state, recall):
        states.append(weakref.ref(state))
        restore(image, state, recall)

    def on_event(event):
        if isinstance(event, Stepped):
            left.append(states[0]() is not None)

    monkeypatch.setattr(family, "restore", restoring)
    elsewhere.restore(blobs[2], on_event).result(60)

    assert left == [False, False]


def test_a_restored_image_has_a_deadline_of_its_own(engine, elsewhere):
    _, blobs = snapshots_at_every_step(engine, reproducible("a", num_steps=4))

    assert elsewhere.restore(blobs[2], within_s=60).result(60)
    with pytest.raises(DeadlinePassed, match="step 2 of 4"):
        elsewhere.restore(blobs[2], within_s=0).result(60)


# --- forks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m", "unipc"])
def test_a_fork_under_the_same_prompt_ends_where_its_origin_did(engine, sampler):
    # Memoryless samplers to the bit; a multi-step one starts its order again, and ends close by.
    origin = engine.submit(
        reproducible("origin", owner="acme", sampler=sampler, num_steps=8, keep_steps=(2,))
    ).result(60)

    fork = engine.submit(
        reproducible("fork", owner="acme", sampler=sampler, num_steps=8, fork=Fork("origin", 2))
    ).result(60)

    away = np.abs(fork.pixels.astype(int) - origin.pixels.astype(int)).max()
    assert fork.record.forwards == 6
    assert away == 0 if sampler in ("ddim", "euler") else away <= 40


def test_a_fork_takes_another_prompt_from_that_step_on(engine):
    origin = engine.submit(
        reproducible("origin", owner="acme", num_steps=6, keep_steps=(1, 3))
    ).result(60)
    edited = reproducible(
        "edited", owner="acme", num_steps=6, prompt="a green star", fork=Fork("origin", 3)
    )

    early = engine.submit(replace(edited, id="early", fork=Fork("origin", 1))).result(60)
    late = engine.submit(edited).result(60)
    again = engine.submit(replace(edited, id="again")).result(60)

    assert not np.array_equal(late.pixels, origin.pixels)
    assert not np.array_equal(late.pixels, early.pixels)
    assert np.array_equal(late.pixels, again.pixels)


def test_kept_latents_are_for_their_owner_alone(engine):
    engine.submit(a_request("origin", owner="acme", num_steps=4, keep_steps=(2,))).result(60)

    with pytest.raises(UnsupportedRequest, match="no latents") as refused:
        engine.submit(a_request("fork", owner="umbrella", num_steps=4, fork=Fork("origin", 2)))
    assert refused.value.field == "fork"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"num_steps": 5}, "num_steps"),
        ({"sampler": "euler"}, "sampler"),
        ({"width_px": 96}, "width_px"),
        ({"policy_version": "2"}, "policy_version"),
        ({"fork": Fork("nobody", 2)}, "fork"),
    ],
)
def test_a_fork_must_have_the_schedule_of_its_origin(engine, changes, field):
    engine.submit(a_request("origin", owner="acme", num_steps=4, keep_steps=(2,))).result(60)

    with pytest.raises(UnsupportedRequest) as refused:
        engine.submit(
            a_request(
                "fork", **{"owner": "acme", "num_steps": 4, "fork": Fork("origin", 2)} | changes
            )
        )
    assert refused.value.field == field


def test_a_snapshot_can_be_forked_too(engine, elsewhere):
    expected = engine.submit(
        reproducible("origin", owner="acme", num_steps=6, keep_steps=(3,))
    ).result(60)
    _, blobs = snapshots_at_every_step(engine, reproducible("origin", owner="acme", num_steps=6))

    same = elsewhere.fork(blobs[3], reproducible("same", num_steps=6)).result(60)
    other = elsewhere.fork(
        blobs[3], reproducible("other", num_steps=6, prompt="a green star")
    ).result(60)

    assert np.array_equal(same.pixels, expected.pixels)
    assert not np.array_equal(other.pixels, expected.pixels)


def test_a_snapshot_after_the_last_step_leaves_a_fork_nothing_to_denoise(engine, elsewhere):
    _, blobs = snapshots_at_every_step(engine, reproducible("origin", num_steps=3))

    with pytest.raises(UnsupportedRequest, match="nothing is left to denoise") as refused:
        elsewhere.fork(blobs[3], reproducible("fork", num_steps=3))
    assert refused.value.field == "fork"
    assert elsewhere.fork(blobs[2], reproducible("fork", num_steps=3)).result(60)


def test_kept_latents_are_bounded_and_the_oldest_go_first(checkpoint):
    one_entry = 4 * 8 * 8 * 4  # bytes of [1, 4, 8, 8] in fp32
    with Engine(EngineConfig(latent_cache_bytes=2 * one_entry), [a_spec(checkpoint)]) as engine:
        for name in ("a", "b", "c"):
            engine.submit(a_request(name, num_steps=3, keep_steps=(1,))).result(60)

        assert engine.stats()["latent_cache_bytes"] == 2 * one_entry
        with pytest.raises(UnsupportedRequest):
            engine.submit(a_request("fork", num_steps=3, fork=Fork("a", 1)))
        engine.submit(a_request("fork", num_steps=3, fork=Fork("c", 1))).result(60)


def queued_behind(engine, first_step):
    """Hold the engine at a step of another image, so that what is submitted meanwhile waits; call
    the result to let go.
    """
    reached, go = threading.Event(), threading.Event()

    def on_event(event):
        if isinstance(event, Stepped) and event.step == first_step:
            reached.set()
            assert go.wait(30)

    engine.submit(a_request("ahead", rank=0), on_event)
    assert reached.wait(30)
    return go.set


def test_a_snapshot_of_a_restored_image_that_still_waits_is_of_its_step(engine, elsewhere):
    expected, blobs = snapshots_at_every_step(engine, reproducible("a", num_steps=4))
    go = queued_behind(elsewhere, 1)
    handle = elsewhere.restore(blobs[3])
    again = elsewhere.snapshot("a")
    go()

    assert peek(again.result(30)).step == 3
    assert np.array_equal(handle.result(60).pixels, expected.pixels)
    moved = engine.restore(again.result()).result(60)
    assert moved.record.forwards == 1
    assert np.array_equal(moved.pixels, expected.pixels)


def test_a_restored_image_that_still_waits_counts_the_steps_of_its_strength(engine, elsewhere):
    picture = Picture(np.full((64, 64, 3), 90, np.uint8))
    request = reproducible("a", num_steps=4, init_image=picture, strength=0.5)
    expected, blobs = snapshots_at_every_step(engine, request)
    go = queued_behind(elsewhere, 1)
    handle = elsewhere.restore(blobs[1])
    waiting, again = handle.progress(), elsewhere.snapshot("a")
    go()

    assert (waiting.step, waiting.num_steps) == (1, 2)
    assert (peek(again.result(30)).step, peek(again.result()).num_steps) == (1, 2)
    assert np.array_equal(handle.result(60).pixels, expected.pixels)


def test_a_fork_that_still_waits_has_no_snapshot(engine):
    engine.submit(a_request("origin", owner="acme", num_steps=4, keep_steps=(2,))).result(60)
    go = queued_behind(engine, 1)
    engine.submit(a_request("fork", owner="acme", num_steps=4, fork=Fork("origin", 2)))
    asked = engine.snapshot("fork")
    go()

    with pytest.raises(SnapshotRefused, match="has not started"):
        asked.result(30)


def test_a_fork_has_a_fingerprint_of_its_own_which_goes_with_it(engine, elsewhere):
    plain = engine.submit(
        reproducible("origin", owner="acme", num_steps=4, keep_steps=(1,))
    ).result(60)
    fork = reproducible(
        "fork", owner="acme", num_steps=4, prompt="a green star", fork=Fork("origin", 1)
    )
    expected, blobs = snapshots_at_every_step(engine, fork)

    moved = elsewhere.restore(blobs[3]).result(60)

    assert expected.record.fingerprint != plain.record.fingerprint
    assert moved.record.fingerprint == expected.record.fingerprint
    assert np.array_equal(moved.pixels, expected.pixels)


def test_an_image_that_starts_from_a_picture_keeps_no_latents(engine):
    picture = Picture(np.zeros((64, 64, 3), np.uint8))

    with pytest.raises(UnsupportedRequest) as refused:
        engine.submit(a_request("a", init_image=picture, strength=0.5, keep_steps=(1,)))
    assert refused.value.field == "keep_steps"


# --- ranks ----------------------------------------------------------------------------------------


def test_a_better_rank_parks_an_image_which_then_goes_on_with_the_same_bits(checkpoint):
    with Engine(EngineConfig(max_inflight=1), [a_spec(checkpoint)]) as engine:
        alone = engine.submit(reproducible("bulk", rank=2, num_steps=6)).result(60)
        events, urgent = [], []

        def on_event(event):
            events.append(event)
            if isinstance(event, Stepped) and event.step == 2 and not urgent:
                urgent.append(engine.submit(a_request("urgent", rank=0, num_steps=3)))

        bulk = engine.submit(reproducible("bulk", rank=2, num_steps=6), on_event).result(60)

    interruptions = [event for event in events if isinstance(event, Parked | Resumed)]
    assert [(type(event), event.step) for event in interruptions] == [(Parked, 2), (Resumed, 2)]
    assert urgent[0].result().record.shared_forwards == 0
    assert np.array_equal(bulk.pixels, alone.pixels)


def test_a_rank_can_be_changed_in_flight(checkpoint):
    with Engine(EngineConfig(max_inflight=1), [a_spec(checkpoint)]) as engine:
        order, handles = [], {}

        def on_event(event):
            if isinstance(event, Finished):
                order.append(event.request_id)
            if isinstance(event, Stepped) and event.step == 1 and not handles:
                handles["second"] = engine.submit(a_request("second", rank=1), on_event)
                handles["third"] = engine.submit(a_request("third", rank=1), on_event)
                handles["third"].set_rank(0)

        engine.submit(a_request("first", rank=1, num_steps=8), on_event).result(60)
        for handle in handles.values():
            handle.result(60)

    assert order[0] == "third"


# --- previews -------------------------------------------------------------------------------------


def test_previews_come_while_somebody_watches(checkpoint):
    with Engine(EngineConfig(previews_per_s=1e6), [a_spec(checkpoint)]) as engine:
        events, handles = [], []

        def on_event(event):
            events.append(event)
            if isinstance(event, Stepped) and event.step in (2, 5):
                engine.watch("a", event.step == 2)

        handles.append(engine.submit(a_request("a", num_steps=8), on_event))
        handles[0].result(60)

    previews = [event for event in events if isinstance(event, Previewed)]
    assert [preview.step for preview in previews] == [3, 4, 5]
    assert all(Image.open(io.BytesIO(preview.jpeg)).size == (256, 256) for preview in previews)


def test_previews_are_packed_beside_the_device_thread_and_told_before_the_end(checkpoint):
    with Engine(EngineConfig(previews_per_s=1e6), [a_spec(checkpoint)]) as engine:
        told = []

        def on_event(event):
            told.append((type(event), threading.current_thread().name))
            engine.watch("a", True)

        engine.submit(a_request("a", num_steps=4), on_event).result(60)

    assert {name for kind, name in told if kind is Previewed} == {"fetches"}
    assert {name for kind, name in told if kind is not Previewed} == {"engine"}
    assert [kind for kind, _ in told].count(Previewed) >= 3
    assert told[-1][0] is Finished


def test_previews_change_no_bit(engine):
    unseen = engine.submit(reproducible("a", sampler="dpmpp_2m_sde", num_steps=5)).result(60)

    handle = engine.submit(
        reproducible("a", sampler="dpmpp_2m_sde", num_steps=5),
        lambda event: engine.watch("a", True),
    )

    assert np.array_equal(handle.result(60).pixels, unseen.pixels)
    assert handle.progress().state is RenderState.FINISHED


def test_previews_are_rate_limited(checkpoint):
    with Engine(EngineConfig(previews_per_s=0.01), [a_spec(checkpoint)]) as engine:
        events = []

        def on_event(event):
            events.append(event)
            engine.watch("a", True)

        engine.submit(a_request("a", num_steps=8), on_event).result(60)

    assert len([event for event in events if isinstance(event, Previewed)]) == 1  # of eight steps
