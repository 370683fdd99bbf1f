"""No first use of anything in service: what a warm-up tries and measures, and what shows a gap."""

import logging

import pytest
from engine_builders import SAMPLERS, a_key, a_spec, an_image, measured_costs

from engine.conditioning import ConditioningCache
from engine.config import EngineConfig
from engine.costs import CostModel
from engine.device import Device
from engine.engine import Engine
from engine.families import latent
from engine.runner import Runner
from engine.scheduler import Batch, Decode
from engine.slowforwards import SlowForwards
from engine.warmup import warm_up

BASE_BYTES = 1000
ENCODE_BYTES = 300
ROW_BYTES = 10
DECODE_BYTES = 50


class MeteredDevice(Device):
    """A CPU with a GPU's meter of memory, which networks move when they compute."""

    peak = BASE_BYTES

    def memory_bytes(self) -> int:
        return BASE_BYTES

    def forget_peak(self) -> None:
        self.peak = BASE_BYTES

    def peak_bytes(self) -> int:
        return self.peak

    def take(self, size_bytes: int) -> None:
        """Note that a network computes in so much memory."""
        self.peak = max(self.peak, BASE_BYTES + size_bytes)


@pytest.fixture(scope="module")
def engine(checkpoint):
    with Engine(EngineConfig(max_batch_rows=4), [a_spec(checkpoint)]) as engine:
        yield engine


def warmed_up(engine, on_piece=lambda: None, **changes) -> CostModel:
    """Warm its checkpoint up once more, on a metered device; give what that measured."""
    device = MeteredDevice("cpu", num_threads=1)
    family = engine._checkpoints["tiny"].family
    takes = {
        family._vae.encoder: lambda inputs: ENCODE_BYTES,
        family._unet: lambda inputs: ROW_BYTES * len(inputs[0]),
        family._vae.decoder: lambda inputs: DECODE_BYTES,
    }
    hooks = [
        network.register_forward_pre_hook(
            lambda _, inputs, needed=needed: device.take(needed(inputs))
        )
        for network, needed in takes.items()
    ]
    costs = CostModel()
    given = {
        "validated": engine._checkpoints.admit_before_service,
        "runner": Runner(engine._checkpoints, device, ConditioningCache(0)),
        "device": device,
        "costs": costs,
        "max_batch_rows": 4,
    }
    try:
        for _ in warm_up(engine._checkpoints["tiny"].spec, **given | changes):
            on_piece()
    finally:
        for hook in hooks:
            hook.remove()
    return costs


def test_a_warm_up_makes_the_first_steps_of_every_sampler(engine, monkeypatch):
    made = []
    step = latent.sampler_step

    def noted(sampler, *rest):
        made.append(sampler)
        return step(sampler, *rest)

    monkeypatch.setattr(latent, "sampler_step", noted)

    warmed_up(engine)

    steps = [made.count(sampler) for sampler in dict.fromkeys(made)]
    assert sum(number >= 3 for number in steps) == len(SAMPLERS)


def test_a_warm_up_measures_the_memory_of_a_picture_s_encode(engine):
    [measured] = [one for one in warmed_up(engine).measurements() if one.footprint]

    footprint = measured.footprint
    assert footprint.encode_bytes == ENCODE_BYTES
    assert (footprint.per_row_bytes, footprint.decode_bytes) == (ROW_BYTES, DECODE_BYTES)


def test_a_load_leaves_room_for_the_larger_of_encode_and_row_beside_a_decode(engine):
    assert warmed_up(engine).working_bytes() == ENCODE_BYTES + DECODE_BYTES


def test_a_brief_warm_up_encodes_no_picture(engine):
    assert warmed_up(engine, is_brief=True).working_bytes() == 0


def test_a_piece_of_a_warm_up_makes_the_forwards_of_one_bucket(engine):
    made, pieces = [], []
    hook = engine._checkpoints["tiny"].family._unet.register_forward_hook(
        lambda _, inputs, __: made.append(len(inputs[0]))
    )

    def note_piece():
        pieces.append(tuple(made))
        made.clear()

    warmed_up(engine, note_piece)
    hook.remove()

    assert {(1, 1), (2, 2), (4, 4)} <= set(pieces), "one that is tried and one that is measured"
    assert max(map(len, pieces)) == 2


# --- forwards that are slow nevertheless ---


@pytest.mark.parametrize(("seconds", "is_slow"), [(3.3, True), (2.9, False)])
def test_a_forward_of_over_three_times_its_curve_is_counted_and_told(seconds, is_slow, caplog):
    charged = []
    slow = SlowForwards(measured_costs(), lambda *charge: charged.append(charge))
    batch = Batch((an_image("a", guidance=1.0),), 1)

    with caplog.at_level(logging.WARNING):
        slow.charge(batch, seconds, False)

    assert slow.count == is_slow
    told = [one for one in caplog.records if one.message == "forward_slow"]
    assert [(one.checkpoint, one.size, one.rows) for one in told] == [
        ("tiny", "64x64", 1)
    ] * is_slow
    assert charged == [(batch, seconds, False)]


def test_a_slow_forward_is_one_that_somebody_feels():
    costs = CostModel()
    costs.observe_step(a_key(), 1, 0.001)
    slow = SlowForwards(costs, lambda *_: None)

    slow.charge(Batch((an_image("a", guidance=1.0),), 1), 0.09, True)

    assert slow.count == 0


def test_forwards_without_a_curve_and_decodes_are_not_called_slow():
    slow = SlowForwards(CostModel(), lambda *_: None)
    known = SlowForwards(measured_costs(), lambda *_: None)

    slow.charge(Batch((an_image("a"),), 2), 100.0, True)
    known.charge(Decode(an_image("a")), 100.0, True)

    assert (slow.count, known.count) == (0, 0)
