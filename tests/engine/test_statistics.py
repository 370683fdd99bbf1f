"""What an engine says of itself: plain numbers since the start, each counted where it happens."""

import threading

import pytest
from engine_builders import a_request, a_spec, reproducible

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import DeadlinePassed, ImageCanceled
from engine.events import Previewed, Stepped


def held_at(step):
    """(on_event, reached, go): an image that waits at a step boundary until the test lets it go."""
    reached, go = threading.Event(), threading.Event()

    def on_event(event):
        if isinstance(event, Stepped) and event.step == step:
            reached.set()
            assert go.wait(30)

    return on_event, reached, go


def counted(stats, *names):
    return {name: stats[name] for name in names}


def test_stats_count_images_by_where_they_stand(checkpoint):
    where = ("waiting", "inflight", "parked", "parks", "finished", "canceled", "failed")
    with Engine(EngineConfig(max_inflight=1), [a_spec(checkpoint)]) as engine:
        on_event, reached, go = held_at(1)
        first = engine.submit(a_request("first", rank=1), on_event)
        assert reached.wait(30)
        on_event, better_reached, better_go = held_at(1)
        better = engine.submit(a_request("better", rank=0), on_event)
        with_an_arrival = counted(engine.stats(), *where)
        go.set()
        assert better_reached.wait(30)
        with_a_parked_one = counted(engine.stats(), *where)
        first.cancel()
        better_go.set()
        better.result(60)
        with pytest.raises(ImageCanceled):
            first.result(60)
        with pytest.raises(DeadlinePassed):
            engine.submit(a_request("late"), within_s=-1).result(60)
        at_the_end = counted(engine.stats(), *where)

    assert list(with_an_arrival.values()) == [1, 1, 0, 0, 0, 0, 0]
    assert list(with_a_parked_one.values()) == [0, 1, 1, 1, 0, 0, 0]
    assert list(at_the_end.values()) == [0, 0, 0, 1, 1, 1, 1]


def test_stats_find_an_image_once_while_it_is_taken_in(checkpoint, monkeypatch):
    found = []
    with Engine(EngineConfig(), [a_spec(checkpoint)]) as engine:
        add = engine._scheduler.add
        asker = threading.Thread(target=lambda: found.append(engine.stats()["waiting"]))

        def adding(image, now_s):
            asker.start()
            asker.join(0.2)  # it waits until the image is in
            add(image, now_s)

        monkeypatch.setattr(engine._scheduler, "add", adding)
        engine.submit(a_request("a"), lambda event: asker.join(30)).result(60)

    assert found == [1]


def test_stats_count_forwards_rows_and_padding(checkpoint):
    names = ("steps", "image_steps", "rows", "padded_rows", "mean_rows_per_forward")
    with Engine(EngineConfig(max_batch_rows=8), [a_spec(checkpoint)]) as engine:
        idle = engine.stats()
        engine.submit(reproducible("a", bucket_rows=8, num_steps=3, rank=2)).result(60)
        engine.submit(a_request("b", num_steps=2, guidance=1.0)).result(60)
        stats = engine.stats()

    assert counted(idle, *names) == dict.fromkeys(names, 0)
    assert list(counted(stats, *names).values()) == [5, 5, 3 * 2 + 2, 3 * 6, 8 / 5]
    assert list(stats["seconds_per_forward_by_rows"]) == [1, 8]
    assert list(stats["seconds_by_rank"]) == [0, 2]
    assert stats["forward_s"] > 0
    assert stats["encode_s"] > 0
    assert stats["decode_s"] > 0


def test_stats_count_what_caches_gave_and_what_they_hold(checkpoint):
    caches = (
        "cache_hits",
        "cache_misses",
        "latent_cache_hits",
        "latent_cache_misses",
        "latent_cache_bytes",
    )
    with Engine(EngineConfig(), [a_spec(checkpoint)]) as engine:
        before = engine.stats()
        for name in ("a", "b"):
            engine.submit(
                a_request(name, num_steps=2, keep_steps=(1,), prompt="a large green star")
            ).result(60)
        stats = engine.stats()

    # warm-up knew the empty prompt
    assert [stats[name] - before[name] for name in caches] == [3, 1, 0, 0, 2 * 4 * 8 * 8 * 4]
    assert stats["cache_bytes"] > before["cache_bytes"]
    assert counted(stats, "adapter_hits", "adapter_bytes", "block_cache_rows_skipped") == {
        "adapter_hits": 0,
        "adapter_bytes": 0,
        "block_cache_rows_skipped": 0,
    }


def test_stats_count_loads_and_previews(checkpoint):
    events = []
    with Engine(EngineConfig(previews_per_s=1e6), [a_spec(checkpoint)]) as engine:

        def on_event(event):
            events.append(event)
            engine.watch("a", True)

        engine.submit(a_request("a"), on_event).result(60)
        stats = engine.stats()

    assert stats["previews"] == sum(isinstance(event, Previewed) for event in events) > 0
    assert stats["loads"] == 1
    assert stats["load_s"] == engine.load_s > 0
    assert stats["warm_up_s"] == engine.warm_up_s > 0
