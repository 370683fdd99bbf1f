"""The pictures of one request: what they may cost the others who are served meanwhile."""

import base64
import uuid
from dataclasses import replace
from types import SimpleNamespace

import pytest

from app.problems import InvalidImageRequest
from app.services import inputs
from app.services.batches import submit_batch
from app.services.inputs import MAX_NEW_PICTURES, Intake
from edges.objectstore import ObjectGone, ObjectStore, StoreUnavailable
from edges.outbound import Unreachable
from policy.limits import Limits
from settings import GatewaySettings
from tests.app.test_services import ASKED
from tests.builders import settings_for
from tests.pictures import a_picture, png


class Decoders:
    """Counts the pictures that are decoded."""

    def __init__(self, real) -> None:
        self._real = real
        self.decoded = 0

    def normalise(self, *given, **more):
        self.decoded += 1
        return self._real.normalise(*given, **more)


@pytest.mark.parametrize("why", ["object_store", "storage-quota-exceeded"])
def test_after_one_picture_that_cannot_be_stored_no_further_one_of_the_request_is_decoded(
    runtime, caller, elsewhere, stack, why
):
    decoders = Decoders(runtime.decoders)
    full = replace(runtime, decoders=decoders)
    if why == "object_store":
        broken = settings_for(GatewaySettings, stack.env, **elsewhere("object_store"))
        full = replace(full, store=ObjectStore(broken))
    else:
        caller = replace(caller, limits=Limits(max_stored_bytes=1))
    asked = [
        replace(ASKED, pictures={"init_image": data_url(png(a_picture(20, 20 + place)))})
        for place in range(3)
    ]

    batch = submit_batch(full, caller, iter(asked))

    assert decoders.decoded == 1
    problems = [item["problem"] for item in batch.items]
    assert problems == [problems[0]] * 3
    assert why in (problems[0].get("part"), problems[0]["type"].rpartition("/")[2])


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


class SlowOutbound:
    """Fetches nothing, and lets `each_s` pass at every attempt, or what it is allowed to take."""

    def __init__(self, each_s: float) -> None:
        self._each_s = each_s
        self._now = 100.0
        self.allowed_s: list[float] = []

    def monotonic(self) -> float:
        return self._now

    def refusal(self, url: str) -> None:
        return None

    def fetch(self, url: str, *, max_bytes: int, timeout_s: float) -> bytes:
        self.allowed_s.append(timeout_s)
        self._now += min(self._each_s, timeout_s)
        raise Unreachable("it takes too long")


@pytest.mark.parametrize(
    ("each_s", "allowed_s"),
    [(10.0, [10.0, 10.0, 10.0]), (8.0, [10.0, 10.0, 10.0, 6.0]), (3.0, [10.0] * 6)],
)
def test_all_urls_of_a_request_together_take_at_most_three_times_the_time_of_one(
    runtime, caller, monkeypatch, each_s, allowed_s
):
    outbound = SlowOutbound(each_s)
    monkeypatch.setattr(inputs, "time", outbound)
    settings = runtime.settings.model_copy(update={"fetch_within_s": 10.0})
    parts = replace(runtime, settings=settings, outbound=outbound)
    intake = Intake(parts, replace(caller, limits=Limits(url_inputs=True)))

    for place in range(6):
        with pytest.raises(InvalidImageRequest):
            intake.files({"init_image": f"https://example.com/{place}.png"})

    assert outbound.allowed_s == allowed_s


def test_a_store_that_is_away_is_asked_for_one_mask_of_a_request(runtime, caller):
    """The jobs are accepted unjudged, a thousand of a batch as well as one."""
    asked = []

    def get(key: str, *, soon: bool) -> bytes:
        asked.append(key)
        raise StoreUnavailable("away")

    intake = Intake(replace(runtime, store=SimpleNamespace(get=get)), caller)
    masks = [a_mask(key) for key in ("one", "two", "three")]

    for mask in masks:
        intake.check_mask(mask, 128, 128)

    assert asked == ["one"]
    assert not intake.has_hole(masks[0], 128, 128)


def test_a_mask_that_the_store_has_lost_leaves_the_others_to_be_judged(runtime, caller):
    """However many jobs of the request name it: it is asked for once."""
    asked = []

    def get(key: str, *, soon: bool) -> bytes:
        asked.append(key)
        if key == "lost":
            raise ObjectGone("lost")
        return b"content"

    decoders = SimpleNamespace(selects=lambda *_, **__: False)
    store = SimpleNamespace(get=get)
    intake = Intake(replace(runtime, store=store, decoders=decoders), caller)
    lost = a_mask("lost")

    for _ in range(MAX_NEW_PICTURES + 1):
        intake.check_mask(lost, 128, 128)

    with pytest.raises(InvalidImageRequest, match="selects nothing"):
        intake.check_mask(a_mask("there"), 128, 128)
    assert asked == ["lost", "there"]


def a_mask(key: str) -> SimpleNamespace:
    return SimpleNamespace(
        id=uuid.uuid4(), object_key=key, content_sha256=uuid.uuid4().hex, mode="RGBA"
    )
