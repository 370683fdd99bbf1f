"""What an engine says of texts that its checkpoints do not read to the end."""

import threading
from functools import partial

import numpy as np
import pytest
from diffusers import EulerDiscreteScheduler
from engine_builders import ALWAYS, a_request, a_spec
from tiny_checkpoints import save_tiny_sdxl
from tiny_flow_checkpoints import save_tiny_flux, save_tiny_sd3

from engine.config import EngineConfig
from engine.engine import Engine
from engine.events import Resumed, Started, Stepped
from engine.texts import TokenCount, UnreadText

ROOM = 14  # tokens of a text between the first and the last of the CLIP encoders' 16
FITS, LONG = "red " * ROOM, "red " * (ROOM + 6)
NOISE, FLOW, SIZES = ("euler",), ("flow_euler",), {"sizes": ((64, 64),)}


@pytest.fixture(scope="module")
def engine(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    sdxl = save_tiny_sdxl(folder / "sdxl", EulerDiscreteScheduler(beta_schedule="scaled_linear"))
    specs = [
        a_spec(checkpoint, name="sd", samplers=NOISE, **SIZES),
        a_spec(sdxl, name="sdxl", family="sdxl", samplers=NOISE, **SIZES),
        a_spec(save_tiny_sd3(folder / "sd3"), name="sd3", family="sd3", samplers=FLOW, **SIZES),
        a_spec(
            save_tiny_sd3(folder / "clip", with_t5=False),
            name="sd3 without T5",
            family="sd3",
            samplers=FLOW,
            **SIZES,
        ),
        a_spec(save_tiny_flux(folder / "flux"), name="flux", family="flux", samplers=FLOW, **SIZES),
    ]
    with Engine(EngineConfig(growth_ceiling=ALWAYS, max_batch_rows=8), specs) as engine:
        yield engine


def told_of(engine, name, **changes):
    """What the image's beginning tells, and its pixels."""
    events = []
    sampler = FLOW[0] if "sd3" in name or name == "flux" else NOISE[0]
    request = a_request("image", checkpoint=name, sampler=sampler, num_steps=2, **changes)
    finished = engine.submit(request, on_event=events.append).result(60)
    [started] = [event for event in events if isinstance(event, Started)]
    return started.unread, finished.pixels


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3 without T5"])
def test_text_after_the_last_token_is_told_and_has_no_effect(engine, name):
    unread, pixels = told_of(engine, name, prompt=f"{LONG}circle")
    _, others = told_of(engine, name, prompt=f"{LONG}square")

    assert unread == (UnreadText(field="prompt", tokens_given=ROOM + 7, tokens_read=ROOM),)
    assert np.array_equal(pixels, others)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "sd3 without T5", "flux"])
def test_nothing_is_told_of_a_text_that_is_read_to_its_end(engine, name):
    assert told_of(engine, name, prompt=FITS)[0] == ()


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_text_that_one_encoder_reads_to_its_end_is_read(engine, name):
    unread, pixels = told_of(engine, name, prompt=f"{LONG}circle")
    _, others = told_of(engine, name, prompt=f"{LONG}square")

    assert unread == ()
    assert not np.array_equal(pixels, others)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_a_negative_prompt_without_guidance_is_told_and_has_no_effect(engine, name):
    unread, pixels = told_of(engine, name, prompt="a circle", negative_prompt="blue", guidance=1.0)
    _, others = told_of(engine, name, prompt="a circle", guidance=1.0)

    [text] = unread
    assert (text.field, text.tokens_read) == ("negative_prompt", 0)
    assert text.tokens_given >= 1
    assert np.array_equal(pixels, others)


@pytest.mark.parametrize(
    ("name", "prompt", "counted"),
    [
        ("sd", FITS, TokenCount(given=ROOM, read=ROOM)),
        ("sd", f"{LONG}circle", TokenCount(given=ROOM + 7, read=ROOM)),
        ("sd", "", TokenCount(given=0, read=0)),
    ],
)
def test_the_tokens_of_the_prompt_are_in_the_record_of_an_image(engine, name, prompt, counted):
    request = a_request("image", checkpoint=name, sampler=NOISE[0], num_steps=2, prompt=prompt)

    assert engine.submit(request).result(60).record.prompt == counted


def test_a_negative_prompt_is_cut_off_as_a_prompt_is(engine):
    unread, _ = told_of(engine, "sd", prompt="a circle", negative_prompt=LONG, guidance=3.0)

    assert unread == (UnreadText(field="negative_prompt", tokens_given=ROOM + 6, tokens_read=ROOM),)


def test_a_blank_negative_prompt_says_nothing_that_could_be_left_unread(engine):
    assert told_of(engine, "sd", prompt="a circle", negative_prompt="  ", guidance=1.0)[0] == ()


def begun(submit):
    """The handle of an image that has made a step, and its events until then."""
    events, stepped = [], threading.Event()

    def hear(event):
        events.append(event)
        if isinstance(event, Stepped):
            stepped.set()

    handle = submit(on_event=hear)
    assert stepped.wait(60)
    return handle, events


def test_unread_text_is_told_again_when_an_image_goes_on_from_a_snapshot(engine):
    wish = {"checkpoint": "sd", "sampler": "euler", "num_steps": 400, "prompt": LONG}
    handle, _ = begun(partial(engine.submit, a_request("here", **wish)))
    snapshot = handle.snapshot(60)
    handle.cancel()

    resumed, events = begun(partial(engine.restore, snapshot, request=a_request("there", **wish)))
    resumed.cancel()

    [began] = [event for event in events if isinstance(event, Resumed)]
    assert began.unread == (UnreadText(field="prompt", tokens_given=ROOM + 6, tokens_read=ROOM),)
