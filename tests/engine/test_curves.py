"""Measured curves are data: written by a calibration, loaded by the workers they are for, ignored
by all others.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from engine_builders import a_request, a_spec

from engine.calibrate import calibrate
from engine.config import EngineConfig
from engine.costs import CostModel
from engine.curves import curve_file, load_curves, save_curves, to_data
from engine.engine import Engine
from engine.fingerprint import Fingerprint
from engine.inflight import BatchKey

KEY = BatchKey("tiny", 64, 64, 16)
HERE = Fingerprint({"device": "this one"}, "ab" * 32)
THERE = Fingerprint({"device": "another"}, "cd" * 32)


def known() -> CostModel:
    costs = CostModel()
    for rows, seconds in ((1, 0.02), (2, 0.025), (8, 0.06)):
        costs.observe_step(KEY, rows, seconds)
    costs.observe_decode(KEY, 0.1)
    return costs


def test_curves_measured_here_are_known_at_the_next_start(tmp_path):
    save_curves(known(), tmp_path, "tiny", HERE)
    costs = CostModel()

    assert load_curves(costs, tmp_path, "tiny", HERE)

    assert (costs.step_s(KEY, 8), costs.decode_s(KEY)) == (0.06, 0.1)


def test_curves_measured_on_another_device_are_not_used(tmp_path):
    save_curves(known(), tmp_path, "tiny", THERE)
    costs = CostModel()

    assert not load_curves(costs, tmp_path, "tiny", HERE)
    assert not costs.is_measured(KEY)


@pytest.mark.parametrize(
    "contents",
    ["", "{", "[]", '{"curves": {}}', '{"curves": {"version": 99, "keys": []}}', '{"curves": 5}'],
)
def test_a_file_that_cannot_be_used_is_as_good_as_none(tmp_path, contents):
    curve_file(tmp_path, "tiny", HERE).write_text(contents)

    assert not load_curves(CostModel(), tmp_path, "tiny", HERE)


def test_curves_cut_off_in_writing_leave_those_of_before(tmp_path, monkeypatch):
    save_curves(known(), tmp_path, "tiny", HERE)
    write = Path.write_text

    def full_disk(path, text, **more):
        write(path, text[: len(text) // 2], **more)
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full_disk)
        with pytest.raises(OSError, match="no space"):
            save_curves(known(), tmp_path, "tiny", HERE)

    assert load_curves(CostModel(), tmp_path, "tiny", HERE)


def test_a_calibration_is_what_a_worker_starts_with(checkpoint, tmp_path):
    config = EngineConfig(max_batch_rows=4, warm_up_repeats=3)
    file, points = calibrate(config, a_spec(checkpoint), tmp_path)
    saved = json.loads(file.read_text())["curves"]

    with Engine(replace(config, curves_folder=str(tmp_path)), [a_spec(checkpoint)]) as engine:
        known_at_start = to_data(engine.costs)
        engine.submit(a_request("a")).result(60)

    assert [(point.width_px, point.height_px, point.rows) for point in points] == [
        (width_px, height_px, rows)
        for width_px, height_px in a_spec(checkpoint).sizes
        for rows in (1, 2, 4)
    ]
    assert all(point.step_s > 0 for point in points)
    steps = [[entry["steps"] for entry in data["keys"]] for data in (saved, known_at_start)]
    assert steps[0] == steps[1]  # nothing was measured at warm-up


def test_rows_that_requests_pin_are_among_those_of_the_warm_up(checkpoint):
    spec = a_spec(checkpoint)
    pinned = replace(spec, pinned_rows={spec.sizes[0]: (3,)})

    with Engine(EngineConfig(max_batch_rows=4), [pinned]) as engine:
        curves = to_data(engine.costs)["keys"]

    rows = {(key["width_px"], key["height_px"]): set() for key in (e["key"] for e in curves)}
    for entry in curves:
        size = entry["key"]["width_px"], entry["key"]["height_px"]
        rows[size] |= {int(step[0]) for step in entry["steps"]}
    assert 3 in rows.pop(spec.sizes[0])
    assert all(3 not in others for others in rows.values())


@pytest.mark.parametrize(
    ("given", "buckets"),
    [
        ({"device": "cuda:0", "max_batch_rows": 6}, (1, 2, 4, 6)),
        ({"device": "cuda:0", "row_buckets": ()}, ()),
        ({"device": "cuda:0", "row_buckets": (2, 8)}, (2, 8)),
        ({"device": "cpu"}, ()),
    ],
)
def test_row_buckets_are_doublings_on_a_gpu_unless_somebody_says(given, buckets):
    assert EngineConfig(**given).buckets == buckets
