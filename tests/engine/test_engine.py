"""The engine as its callers meet it: submit, watch, cancel, fail, stop."""

import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engine_builders import a_request, a_spec, reproducible

import engine.inbox as engine_inbox
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import (
    DeadlinePassed,
    EngineError,
    EngineStopped,
    ImageCanceled,
    ImageNotFinite,
    OutOfDeviceMemory,
    SnapshotRefused,
    UnknownCheckpoint,
    UnsupportedRequest,
)
from engine.events import Failed, Finished, Queued, Started, Stepped
from engine.inflight import RenderState
from engine.scheduler import Decode


def family_of(engine):
    return engine._checkpoints["tiny"].family


def held_at(step):
    """(on_event, reached, go): an image that waits at a step boundary until the test lets it go."""
    reached, go = threading.Event(), threading.Event()

    def on_event(event):
        if getattr(event, "step", None) == step:
            reached.set()
            assert go.wait(30)

    return on_event, reached, go


# --- a request's life -----------------------------------------------------------------------------


def test_events_come_in_order_and_all_before_the_result(engine):
    events = []

    image = engine.submit(a_request("a", num_steps=3), events.append).result(60)

    assert [type(event) for event in events] == [
        Queued,
        Started,
        Stepped,
        Stepped,
        Stepped,
        Finished,
    ]
    assert [(event.step, event.num_steps) for event in events[2:5]] == [(1, 3), (2, 3), (3, 3)]
    assert all(event.eta_s is not None and event.eta_s >= 0 for event in events[2:5])
    assert events[-1].image is image


def test_the_pixels_belong_to_the_caller(engine):
    image = engine.submit(a_request("a")).result(60)
    before = image.pixels.copy()

    image.pixels[:] = 0

    assert image.pixels.dtype == np.uint8
    assert image.pixels.flags.c_contiguous
    assert np.array_equal(engine.submit(a_request("a")).result(60).pixels, before)


def test_progress_can_be_read_at_any_time(engine):
    on_event, reached, go = held_at(2)
    handle = engine.submit(a_request("a", num_steps=4), on_event)
    assert reached.wait(30)

    halfway = handle.progress()
    go.set()
    handle.result(60)

    assert (halfway.state, halfway.step, halfway.num_steps) == (RenderState.RUNNING, 2, 4)
    assert halfway.device_seconds > 0
    assert handle.done()
    assert (handle.progress().state, handle.progress().step) == (RenderState.FINISHED, 4)


def test_waiting_too_briefly_does_not_harm_the_image(engine):
    on_event, reached, go = held_at(1)
    handle = engine.submit(a_request("a"), on_event)
    assert reached.wait(30)

    with pytest.raises(TimeoutError):
        handle.result(timeout_s=0.01)
    go.set()

    assert handle.result(60).record.num_steps == 4


def test_the_time_told_with_a_step_is_for_the_steps_left_and_the_decode(engine):
    told = []

    def on_event(event):
        if isinstance(event, Stepped):
            told.append((event.eta_s, engine._ledger.mean_decode_s))
            time.sleep(0.05)

    engine.submit(a_request("a", num_steps=4), on_event).result(60)

    assert told[-1][0] == told[-1][1]
    assert told[-2][0] - told[-2][1] >= 0.05 * 0.3  # one step left; the newest step weighs 0.3


def test_a_turn_that_is_over_takes_no_more_seconds(engine):
    during = []

    engine.submit(a_request("a"), lambda event: during.append(engine.turn_s)).result(60)

    assert max(during) > 0
    deadline = time.monotonic() + 10
    while engine.turn_s and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.turn_s == 0


def test_an_exception_of_a_listener_is_its_own(engine):
    def broken(_event):
        raise RuntimeError("the listener is broken")

    assert engine.submit(a_request("a"), broken).result(60).record.forwards == 4


def test_a_higher_rank_goes_first(checkpoint):
    order = []
    with Engine(EngineConfig(max_batch_rows=2), [a_spec(checkpoint)]) as engine:
        on_event, reached, go = held_at(1)
        bulk = engine.submit(a_request("bulk", rank=2), on_event)
        assert reached.wait(30)
        handles = [
            engine.submit(
                a_request(f"rank {rank}", rank=rank),
                lambda event, rank=rank: order.append((rank, type(event))),
            )
            for rank in (2, 1, 0)
        ]
        go.set()
        for handle in [bulk, *handles]:
            handle.result(60)

    assert [rank for rank, event in order if event is Finished] == [0, 1, 2]


def test_a_newcomer_of_a_better_rank_waits_for_the_forward_in_progress_and_no_further_one(
    checkpoint, monkeypatch
):
    begun, urgent = [], []
    with Engine(EngineConfig(max_inflight=4), [a_spec(checkpoint)]) as engine:
        family = family_of(engine)
        start, predict = family.start, family.predict

        def starting(image, recall):
            begun.append(f"encode {image.id}")
            start(image, recall)

        def predicting(images, bucket_rows):
            # it comes while this forward of the others is in progress
            if images[0].step == 3 and not urgent:
                begun.clear()
                urgent.append(engine.submit(a_request("urgent", rank=0, num_steps=2)))
            begun.append(
                "forward of " + " ".join(sorted({image.id.split()[0] for image in images}))
            )
            return predict(images, bucket_rows)

        monkeypatch.setattr(family, "start", starting)
        monkeypatch.setattr(family, "predict", predicting)
        for handle in [
            engine.submit(a_request(f"bulk {n}", rank=2, num_steps=8)) for n in range(8)
        ]:
            handle.result(60)

    assert begun[:4] == [
        "forward of bulk",
        "encode urgent",
        "forward of urgent",
        "forward of urgent",
    ]
    assert urgent[0].result().record.shared_forwards == 0


@pytest.mark.parametrize("end", [Finished, Failed])
def test_an_image_holds_nothing_on_the_device_when_its_end_is_told(engine, end):
    held = []

    def on_event(event):
        if isinstance(event, Stepped) and event.step == 2 and end is Failed:
            engine.cancel("a")
        if isinstance(event, Started | Finished | Failed):
            held.append((type(event), engine._scheduler.get("a").held is not None))

    handle = engine.submit(a_request("a"), on_event)
    try:
        handle.result(60)
    except ImageCanceled:
        assert end is Failed

    assert held == [(Started, True), (end, False)]


# --- deadlines ------------------------------------------------------------------------------------


def test_an_image_not_finished_in_its_time_fails_at_the_next_step_boundary(engine, monkeypatch):
    events, clock = [], SimpleNamespace(monotonic=time.monotonic)

    def on_event(event):
        events.append(event)
        if isinstance(event, Stepped) and event.step == 2:
            clock.monotonic = lambda: time.monotonic() + 60

    monkeypatch.setattr(engine_inbox, "time", clock)
    handle = engine.submit(a_request("a", num_steps=50), on_event, within_s=60)

    with pytest.raises(DeadlinePassed, match="step 2 of 50"):
        handle.result(60)
    assert isinstance(events[-1].error, DeadlinePassed)
    assert handle.progress().state is RenderState.FAILED


@pytest.mark.parametrize("state", [RenderState.QUEUED, RenderState.PARKED])
def test_it_fails_as_well_while_it_waits(checkpoint, state):
    with Engine(EngineConfig(max_inflight=1), [a_spec(checkpoint)]) as engine:
        if state is RenderState.PARKED:
            on_event, reached, go = held_at(1)
            waiting = engine.submit(
                a_request("waiting", rank=1, num_steps=50), on_event, within_s=0.5
            )
            assert reached.wait(30)
            busy = engine.submit(a_request("busy", rank=0, num_steps=500))
            go.set()
        else:
            busy = engine.submit(a_request("busy", rank=0, num_steps=500))
            waiting = engine.submit(a_request("waiting", rank=1), within_s=0.1)

        with pytest.raises(DeadlinePassed):
            waiting.result(60)

        assert waiting.progress().step == (state is RenderState.PARKED)
        assert engine.stats()["parks"] == (state is RenderState.PARKED)
        assert not busy.done()


def test_a_deadline_that_has_passed_already_is_told_at_once_though_nothing_else_is_to_do(engine):
    for within_s in (0, -3.5):
        with pytest.raises(DeadlinePassed, match="step 0"):
            engine.submit(a_request("a"), within_s=within_s).result(10)


def test_a_deadline_concerns_neither_who_keeps_it_nor_a_later_image_of_the_same_id(engine):
    assert engine.submit(a_request("a"), within_s=0.5).result(60)

    later = engine.submit(a_request("a", num_steps=10), lambda event: time.sleep(0.06), within_s=30)

    assert later.result(60).record.num_steps == 10


@pytest.mark.parametrize("within_s", ["soon", float("nan"), [1]])
def test_a_time_that_is_no_number_is_refused_and_nothing_is_taken(engine, within_s):
    with pytest.raises(UnsupportedRequest) as refused:
        engine.submit(a_request("a"), within_s=within_s)

    assert refused.value.field == "within_s"
    assert engine.submit(a_request("a")).result(60)


# --- accounts -------------------------------------------------------------------------------------


def test_the_shares_of_a_batch_add_up_to_its_forwards(engine):
    before = engine.stats()
    handles = [
        engine.submit(a_request(f"image {n}", seed=n, num_steps=3 + n, guidance=[1.0, 4.0][n % 2]))
        for n in range(5)
    ]
    handles.append(engine.submit(reproducible("pinned")))

    records = [handle.result(60).record for handle in handles]

    after = engine.stats()
    for name, stage in (
        ("denoise_s", "forward_s"),
        ("encode_s", "encode_s"),
        ("decode_s", "decode_s"),
    ):
        assert sum(getattr(record, name) for record in records) == pytest.approx(
            after[stage] - before[stage], rel=1e-9
        )
    for record in records:
        assert record.device_seconds == pytest.approx(
            record.encode_s + record.denoise_s + record.decode_s
        )
        assert record.waited_s >= 0
    by_rank = sum(after["seconds_by_rank"].values()) - sum(before["seconds_by_rank"].values())
    assert by_rank == pytest.approx(sum(record.device_seconds for record in records))
    assert after["image_steps"] - before["image_steps"] == sum(
        record.num_steps for record in records
    )
    assert after["steps"] - before["steps"] < after["image_steps"] - before["image_steps"]


def test_a_record_says_how_long_an_image_waited_and_in_what_company_it_was_made(engine):
    on_event, reached, go = held_at(1)
    begun_at = time.monotonic()
    guided = engine.submit(a_request("guided", num_steps=4), on_event)
    assert reached.wait(30)
    stepped_within_s = time.monotonic() - begun_at
    plain = engine.submit(a_request("plain", num_steps=2, guidance=1.0))
    time.sleep(0.2)
    go.set()

    first, second = guided.result(60).record, plain.result(60).record

    assert (first.forwards, first.shared_forwards, first.max_images, first.max_rows) == (4, 2, 2, 3)
    assert (second.forwards, second.shared_forwards, second.max_images) == (2, 2, 2)
    assert (first.mean_rows, second.mean_rows) == (2.5, 3.0)
    assert first.waited_s < stepped_within_s
    assert second.waited_s >= 0.2
    assert first.denoise_s > second.denoise_s > 0


def test_the_facts_of_a_record_belong_to_the_caller(engine):
    record = engine.submit(a_request("a")).result(60).record
    before = record.fingerprint_facts["libraries"]["torch"]

    record.fingerprint_facts["libraries"]["torch"] = "another"

    record = engine.submit(a_request("a")).result(60).record
    assert record.fingerprint_facts["libraries"]["torch"] == before


def test_images_of_one_job_are_no_strangers_to_each_other(engine):
    on_event, reached, go = held_at(1)
    one = engine.submit(a_request("one", group="job"), on_event)
    assert reached.wait(30)
    other = engine.submit(a_request("other", group="job"))
    go.set()

    assert (one.result(60).record.max_images, one.result(60).record.shared_forwards) == (2, 0)
    assert other.result(60).record.shared_forwards == 0


def test_weights_are_loaded_once_and_stay(checkpoint, monkeypatch):
    import engine.checkpoints as module

    loads = []
    load = module.load_checkpoint

    def counted(*given, **how):
        loads.append(given)
        return load(*given, **how)

    monkeypatch.setattr(module, "load_checkpoint", counted)

    with Engine(EngineConfig(), [a_spec(checkpoint)]) as engine:
        weights = family_of(engine)._unet.conv_in.weight.data_ptr()
        for n in range(3):
            engine.submit(a_request(f"image {n}", num_steps=1)).result(60)

        assert len(loads) == engine.stats()["loads"] == 1
        assert family_of(engine)._unet.conv_in.weight.data_ptr() == weights
        assert engine.load_s > 0


def test_a_prompt_seen_before_is_not_encoded_again(engine):
    engine.submit(a_request("a", prompt="a large green star", num_steps=1)).result(60)
    before = engine.stats()

    engine.submit(a_request("b", prompt="a large green star", num_steps=1)).result(60)

    after = engine.stats()
    assert after["cache_misses"] == before["cache_misses"]
    assert after["cache_hits"] == before["cache_hits"] + 2  # the prompt and the empty negative one


def test_a_prompt_is_encoded_anew_for_a_request_admitted_under_other_rules(engine):
    seen = a_request("a", prompt="a small blue square", policy_version="1", num_steps=1)
    engine.submit(seen).result(60)
    before = engine.stats()["cache_misses"]

    engine.submit(replace(seen, id="b", policy_version="2")).result(60)

    assert engine.stats()["cache_misses"] == before + 2  # the prompt and the empty negative one


# --- cancel ---------------------------------------------------------------------------------------


def test_a_cancel_takes_effect_at_the_next_step_boundary(engine):
    events = []
    hold, reached, go = held_at(2)

    def on_event(event):
        events.append(event)
        hold(event)

    handle = engine.submit(a_request("a", num_steps=50), on_event)
    assert reached.wait(30)

    handle.cancel()
    go.set()

    with pytest.raises(ImageCanceled):
        handle.result(60)
    assert handle.progress().state is RenderState.CANCELED
    assert handle.progress().step == 2
    assert isinstance(events[-1], Failed)


def test_a_cancel_leaves_the_neighbours_alone(engine):
    on_event, reached, go = held_at(1)
    doomed = engine.submit(a_request("doomed", num_steps=50), on_event)
    assert reached.wait(30)
    neighbour = engine.submit(a_request("neighbour"))

    doomed.cancel()
    go.set()

    assert neighbour.result(60).record.forwards == 4


def test_a_cancel_is_harmless_before_the_first_step_twice_and_after_the_end(engine):
    on_event, reached, go = held_at(1)
    first = engine.submit(a_request("first"), on_event)
    assert reached.wait(30)
    unstarted = engine.submit(a_request("unstarted"))
    unstarted.cancel()
    unstarted.cancel()
    go.set()

    with pytest.raises(ImageCanceled):
        unstarted.result(60)
    image = first.result(60)
    first.cancel()

    assert first.result(60) is image
    # the id is free again
    assert engine.submit(a_request("first")).result(60).request.id == "first"


def test_cancels_at_any_moment_leave_nobody_waiting(engine):
    for n in range(20):
        handle = engine.submit(a_request(f"image {n}", num_steps=1 + n % 3))
        time.sleep(0.002 * (n % 8))
        handle.cancel()
        try:
            handle.result(60)
        except ImageCanceled:
            continue

    assert engine.stats()["inflight"] == engine.stats()["waiting"] == 0


def test_a_cancel_in_the_last_event_of_an_image_touches_no_later_one_of_its_id(engine):
    later = []

    def cancel_once_more(event):
        if isinstance(event, Failed):
            engine.cancel("a")

    def use_its_id_again(event):
        if isinstance(event, Failed):
            later.append(engine.submit(a_request("a")))

    on_event, reached, go = held_at(1)
    engine.submit(a_request("ahead"), on_event)
    assert reached.wait(30)
    # these two end between the same two turns, in this order
    engine.submit(a_request("a"), cancel_once_more, within_s=-2)
    handle = engine.submit(a_request("b"), use_its_id_again, within_s=-1)
    go.set()
    with pytest.raises(DeadlinePassed):
        handle.result(60)

    assert later[0].result(60).request.id == "a"


def test_a_cancel_that_comes_as_the_decode_is_chosen_still_saves_it(engine, monkeypatch):
    choose, decoded = engine._scheduler.next_work, []

    def chosen(now_s):
        work = choose(now_s)
        if isinstance(work, Decode):
            engine.cancel(work.image.id)
        return work

    monkeypatch.setattr(engine._scheduler, "next_work", chosen)
    monkeypatch.setattr(engine._runner, "decode", decoded.append)

    with pytest.raises(ImageCanceled):
        engine.submit(a_request("a")).result(60)
    assert decoded == []


class SlowPixels:
    """As a decode on a GPU: on their way until `arrived` is set."""

    def __init__(self, pending, arrived):
        self._pending = pending
        self._arrived = arrived
        self.watch = pending.watch

    @property
    def is_ready(self):
        return self._arrived.is_set()

    def pixels(self):
        return self._pending.pixels()


def test_pixels_of_a_canceled_image_are_not_handed_to_a_later_one_of_its_id(engine, monkeypatch):
    decode, arrived, on_their_way = engine._runner.decode, threading.Event(), []

    def decoding(image):
        pending = decode(image)
        if image.id != "a" or on_their_way:
            return pending
        on_their_way.append(image)
        engine.cancel("a")
        return SlowPixels(pending, arrived)

    def at_its_second_step(event):
        if isinstance(event, Stepped) and event.step == 2:
            arrived.set()

    monkeypatch.setattr(engine._runner, "decode", decoding)
    other = engine.submit(a_request("other", num_steps=999))  # so that nobody waits for pixels
    with pytest.raises(ImageCanceled):
        engine.submit(a_request("a")).result(60)
    later = engine.submit(a_request("a", seed=99), at_its_second_step).result(60)
    other.cancel()
    with pytest.raises(ImageCanceled):
        other.result(60)

    assert arrived.is_set()
    assert (later.request.seed, later.record.forwards) == (99, 4)


# --- when things go wrong -------------------------------------------------------------------------


def poisoned(begin):
    """As `begin`, but the image with seed 666 starts from NaN."""

    def beginning(request, *arguments):
        given = begin(request, *arguments)
        return (
            replace(given, latents=given.latents * float("nan")) if request.seed == 666 else given
        )

    return beginning


def test_an_image_that_turns_to_nan_fails_alone(engine, monkeypatch):
    monkeypatch.setattr(family_of(engine), "begin", poisoned(family_of(engine).begin))
    alone = engine.submit(reproducible("good")).result(60)
    on_event, reached, go = held_at(1)
    good = engine.submit(reproducible("good"), on_event)
    assert reached.wait(30)
    bad = engine.submit(reproducible("bad", seed=666, num_steps=2))
    go.set()

    with pytest.raises(ImageNotFinite):
        bad.result(60)
    assert good.result(60).record.shared_forwards == 2
    assert np.array_equal(good.result().pixels, alone.pixels)


def test_a_row_that_breaks_the_forward_fails_its_own_image_and_the_step_is_repeated_without_it(
    engine, monkeypatch
):
    family = family_of(engine)
    denoise = family.denoise

    def fussy(rows):
        if torch.isnan(rows["latents"]).any():
            raise ValueError("a row is broken")
        return denoise(rows)

    monkeypatch.setattr(family, "begin", poisoned(family.begin))
    monkeypatch.setattr(family, "denoise", fussy)
    alone = engine.submit(reproducible("good")).result(60)
    on_event, reached, go = held_at(1)
    good = engine.submit(reproducible("good"), on_event)
    assert reached.wait(30)
    bad = engine.submit(a_request("bad", seed=666))
    go.set()

    with pytest.raises(EngineError, match="a row is broken"):
        bad.result(60)
    assert good.result(60).record.forwards == 4
    assert np.array_equal(good.result().pixels, alone.pixels)


@pytest.mark.parametrize("stage", ["encode", "denoise", "decode"])
def test_an_error_names_the_stage_and_carries_what_was_raised(engine, monkeypatch, stage):
    raised = ArithmeticError("no such number")

    def broken(*_given, **_more):
        raise raised

    monkeypatch.setattr(
        family_of(engine),
        {"encode": "start", "denoise": "predict", "decode": "decode"}[stage],
        broken,
    )

    with pytest.raises(
        EngineError, match=f"{stage} failed: ArithmeticError: no such number"
    ) as failed:
        engine.submit(a_request("a")).result(60)
    assert failed.value.__cause__ is raised


def test_a_preview_that_fails_is_tried_once_and_harms_no_image(engine, monkeypatch):
    unseen, tried = engine.submit(reproducible("a")).result(60), []

    def broken(image):
        tried.append(image.step)
        raise ValueError("no colours")

    def watch_at_first(event):
        if isinstance(event, Started):
            engine.watch("a", True)

    monkeypatch.setattr(engine._runner, "preview", broken)

    assert np.array_equal(
        engine.submit(reproducible("a"), watch_at_first).result(60).pixels, unseen.pixels
    )
    assert tried == [1]


def test_latents_that_cannot_be_kept_harm_no_image(engine, monkeypatch):
    expected = engine.submit(reproducible("a")).result(60)

    def broken(image):
        raise ValueError("no room")

    monkeypatch.setattr(engine._runner, "latents", broken)

    image = engine.submit(reproducible("a", keep_steps=(1, 2))).result(60)
    assert np.array_equal(image.pixels, expected.pixels)


def test_a_sampler_that_raises_fails_its_own_image(engine, monkeypatch):
    family = family_of(engine)
    advance = family.advance

    def fussy(image, prediction):
        if image.id == "bad" and image.step == 1:
            raise ArithmeticError("no such step")
        advance(image, prediction)

    monkeypatch.setattr(family, "advance", fussy)
    on_event, reached, go = held_at(1)
    good = engine.submit(a_request("good"), on_event)
    assert reached.wait(30)
    bad = engine.submit(a_request("bad"))
    go.set()

    with pytest.raises(EngineError, match="no such step"):
        bad.result(60)
    assert bad.progress().step == 1
    assert good.result(60).record.shared_forwards == 2


def test_when_memory_runs_out_the_batch_shrinks_and_only_what_does_not_fit_alone_fails(
    checkpoint, monkeypatch
):
    with Engine(EngineConfig(), [a_spec(checkpoint)]) as engine:
        family = family_of(engine)
        denoise = family.denoise

        def small_device(rows):
            if len(rows["latents"]) > 2:
                raise MemoryError
            return denoise(rows)

        monkeypatch.setattr(family, "denoise", small_device)
        on_event, reached, go = held_at(1)
        handles = [engine.submit(a_request("a", num_steps=6), on_event)]
        assert reached.wait(30)
        handles += [engine.submit(a_request(id, num_steps=6)) for id in "bc"]
        go.set()

        assert [handle.result(60).record.max_rows for handle in handles] == [2, 2, 2]
        with pytest.raises(OutOfDeviceMemory):
            engine.submit(reproducible("too large", bucket_rows=8)).result(60)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("width_px", {"width_px": 72}),
        ("num_steps", {"num_steps": 0}),
        ("num_steps", {"num_steps": 1001}),
        ("num_steps", {"num_steps": 51, "sampler": "lcm"}),
        ("num_steps", {"num_steps": 4.0}),
        ("guidance", {"guidance": float("nan")}),
        ("guidance", {"guidance": -1.0}),
        ("sampler", {"sampler": "heun"}),
        ("seed", {"seed": 2**63}),
        ("seed", {"seed": -1}),
        ("prompt", {"prompt": "half a \ud800 character"}),
        ("keep_steps", {"keep_steps": (0,)}),
        ("keep_steps", {"keep_steps": (1, 4)}),  # the last step leaves nothing to fork
        ("bucket_rows", {"determinism": "reproducible"}),
        ("bucket_rows", {"determinism": "reproducible", "bucket_rows": 1}),
        ("bucket_rows", {"determinism": "reproducible", "bucket_rows": 17}),
    ],
)
def test_a_request_that_cannot_be_rendered_is_refused_at_once_by_its_field(engine, field, changes):
    from engine.request import Determinism

    changes = {
        **changes,
        **({"determinism": Determinism.REPRODUCIBLE} if "determinism" in changes else {}),
    }

    with pytest.raises(UnsupportedRequest) as refused:
        engine.submit(a_request("a", **changes))

    assert refused.value.field == field
    assert engine.stats()["waiting"] == 0


def test_a_determinism_nobody_knows_is_refused_and_a_plain_string_is_understood(engine):
    with pytest.raises(UnsupportedRequest) as refused:
        engine.submit(a_request("a", determinism="mostly"))

    assert refused.value.field == "determinism"
    assert (
        engine.submit(a_request("a", determinism="reproducible", bucket_rows=4))
        .result(60)
        .record.bucket_rows
        == 4
    )


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("sampler", {"samplers": ("ddim", "magic")}),
        ("width_px", {"sizes": ((65, 64),)}),
        ("sizes", {"sizes": ()}),
    ],
)
def test_a_catalog_that_offers_what_cannot_be_rendered_stops_the_start(checkpoint, field, changes):
    with pytest.raises(UnsupportedRequest) as refused:
        Engine(EngineConfig(), [a_spec(checkpoint, **changes)]).start()

    assert refused.value.field == field


def test_a_checkpoint_of_another_worker_is_refused_by_name(engine):
    with pytest.raises(UnknownCheckpoint, match="elsewhere"):
        engine.submit(a_request("a", checkpoint="elsewhere"))


def test_an_id_in_flight_cannot_be_used_again(engine):
    on_event, reached, go = held_at(1)
    handle = engine.submit(a_request("a"), on_event)
    assert reached.wait(30)

    with pytest.raises(UnsupportedRequest) as refused:
        engine.submit(a_request("a"))
    go.set()

    assert refused.value.field == "id"
    handle.result(60)


# --- the end --------------------------------------------------------------------------------------


def test_stopping_leaves_nobody_waiting(checkpoint):
    engine = Engine(EngineConfig(max_inflight=2), [a_spec(checkpoint)])
    with pytest.raises(EngineStopped):
        engine.submit(a_request("too early"))
    engine.start()
    handles = [engine.submit(a_request(f"image {n}", num_steps=500)) for n in range(4)]

    engine.stop()
    engine.stop()

    for handle in handles:
        with pytest.raises(EngineStopped):
            handle.result(1)
    with pytest.raises(EngineStopped):
        engine.submit(a_request("too late"))
    assert not engine.is_running


def test_an_engine_that_dies_leaves_nobody_waiting(checkpoint, monkeypatch):
    engine = Engine(EngineConfig(), [a_spec(checkpoint)])
    engine.start()

    def broken(now_s):
        raise AssertionError("the books do not balance")

    monkeypatch.setattr(engine._scheduler, "next_work", broken)

    with pytest.raises(EngineStopped, match="the books do not balance"):
        engine.submit(a_request("a")).result(60)
    with pytest.raises(EngineStopped):
        engine.submit(a_request("b"))
    engine.stop()


def test_many_threads_may_submit_at_once(engine):
    images = {}

    def caller(n):
        images[n] = engine.submit(a_request(f"image {n}", seed=n, num_steps=2)).result(60)

    threads = [threading.Thread(target=caller, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert sorted(images) == list(range(12))
    assert len({image.pixels.tobytes() for image in images.values()}) == 12


# --- what one caller does wrong is his own trouble ------------------------------------------------


def is_alive(engine) -> bool:
    return engine.submit(a_request("another")).result(60) is not None


def test_a_rank_that_is_no_number_is_refused_and_the_engine_goes_on(engine):
    handle = engine.submit(a_request("a"))

    with pytest.raises(UnsupportedRequest) as refused:
        engine.set_rank("a", "high")
    assert refused.value.field == "rank"
    assert handle.result(60) is not None
    assert is_alive(engine)


def test_a_snapshot_nobody_waits_for_any_more_is_not_taken(engine):
    on_event, reached, go = held_at(1)
    handle = engine.submit(a_request("a"), on_event)
    assert reached.wait(30)
    asked = engine.snapshot("a")
    assert asked.cancel()
    go.set()

    assert handle.result(60) is not None
    assert is_alive(engine)


@pytest.mark.parametrize("field", ["id", "group", "owner", "policy_version"])
def test_a_name_that_is_no_string_is_refused(engine, field):
    with pytest.raises(UnsupportedRequest) as refused:
        engine.submit(a_request(**{"id": "a", "keep_steps": (1,)} | {field: ["x"]}))
    assert refused.value.field == field


def test_a_handle_of_an_image_that_has_ended_touches_no_other_of_its_id(engine):
    former = engine.submit(a_request("a"))
    former.result(60)
    on_event, reached, go = held_at(1)
    later = engine.submit(a_request("a", seed=99), on_event)
    assert reached.wait(30)

    former.cancel()
    former.set_rank(7)
    with pytest.raises(SnapshotRefused):
        former.snapshot(30)
    go.set()

    assert later.result(60).request.seed == 99


def test_an_image_that_cannot_be_let_go_of_still_ends_for_its_caller(engine, monkeypatch):
    def stuck(image):
        raise RuntimeError("does not let go")

    with monkeypatch.context() as patched:
        patched.setattr(engine._runner, "release", stuck)
        with pytest.raises(EngineError):
            engine.submit(a_request("a")).result(60)
    assert is_alive(engine)


def test_after_a_forward_ran_out_of_memory_the_next_ones_have_half_its_rows_at_most(
    checkpoint, monkeypatch
):
    with Engine(EngineConfig(growth_ceiling=1e9), [a_spec(checkpoint)]) as engine:
        family, sizes = family_of(engine), []
        denoise = family.denoise

        def short_once(rows):
            sizes.append(len(rows["latents"]))
            if sizes[-1] == 8:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return denoise(rows)

        on_event, reached, go = held_at(1)
        handles = [engine.submit(a_request("a", num_steps=6), on_event)]
        assert reached.wait(30)
        monkeypatch.setattr(family, "denoise", short_once)
        handles += [engine.submit(a_request(id, num_steps=6)) for id in "bcd"]
        go.set()
        for handle in handles:
            handle.result(60)

    assert sizes[0] == 8
    assert sizes[1:5] == [2, 2, 2, 2]  # the images of it apart
    assert max(sizes[5:]) == 4


def test_a_pinned_forward_that_ran_out_of_memory_leaves_others_their_rows(checkpoint, monkeypatch):
    with Engine(EngineConfig(growth_ceiling=1e9), [a_spec(checkpoint)]) as engine:
        family, sizes = family_of(engine), []
        denoise = family.denoise

        def short_once(rows):
            sizes.append(len(rows["latents"]))
            if sizes.count(8) == 1 and sizes[-1] == 8:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return denoise(rows)

        def rendered(*requests):
            on_event, reached, go = held_at(1)
            handles = [engine.submit(requests[0], on_event)]
            assert reached.wait(30)
            monkeypatch.setattr(family, "denoise", short_once)
            handles += [engine.submit(request) for request in requests[1:]]
            go.set()
            return [handle.result(60).record for handle in handles]

        rendered(reproducible("a"), reproducible("b"))
        best_effort = rendered(*[a_request(id, num_steps=6) for id in "cd"])

    assert sizes[0] == 8
    assert [record.max_rows for record in best_effort] == [4, 4]


def test_an_image_alone_is_tried_again_when_memory_was_short_for_a_moment(engine, monkeypatch):
    family = family_of(engine)
    denoise, short = family.denoise, [True]

    def briefly_full(rows):
        if short:
            short.clear()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return denoise(rows)

    expected = engine.submit(a_request("a")).result(60)
    monkeypatch.setattr(family, "denoise", briefly_full)

    assert np.array_equal(engine.submit(a_request("a")).result(60).pixels, expected.pixels)
    assert not short


def test_two_precisions_of_one_checkpoint_share_an_engine_and_no_encoding(checkpoint):
    specs = [
        a_spec(checkpoint, name=precision, precision=precision, sizes=((64, 64),))
        for precision in ("fp32", "bf16")
    ]
    with Engine(EngineConfig(max_batch_rows=2, previews_per_s=0), specs) as engine:
        images = [
            engine.submit(a_request(spec.name, checkpoint=spec.name)).result(60) for spec in specs
        ]

    assert images[0].record.fingerprint != images[1].record.fingerprint
