"""Documents of app/schemas: what they have is what is shown and what is described."""

import json

import pytest

from app.http.views import queue_view
from app.live.forecast import QueuePlace as Place
from app.schemas.base import adapter_of, to_json, to_plain
from app.schemas.jobs import Batch, BatchRefused, JobUrls, JobWarning, QueuePlace
from policy.prediction import Eta

URLS = {"self": "/v1/jobs/7", "status": "s", "cancel": "c", "replay": "r", "events": "e"}


def test_a_document_takes_no_member_that_it_does_not_have():
    with pytest.raises(TypeError, match="colour"):
        JobUrls(**URLS, colour="red")


def test_a_document_lacks_no_member():
    with pytest.raises(TypeError, match="events"):
        JobUrls(**{name: url for name, url in URLS.items() if name != "events"})


def test_a_value_that_a_newer_release_wrote_into_a_row_is_shown():
    place = QueuePlace(jobs_ahead="many", eta_p50_s=1, eta_p90_s=None)

    assert json.loads(to_json(place)) == {"jobs_ahead": "many", "eta_p50_s": 1, "eta_p90_s": None}


def test_members_that_a_newer_release_keeps_with_a_warning_are_shown():
    warning = {"code": "c", "field": "prompt", "detail": "d", "severity": 3}

    assert json.loads(adapter_of(list[JobWarning]).dump_json([warning])) == [warning]


def test_text_of_clients_that_utf_8_has_no_bytes_for_is_shown_as_json_escapes_it():
    problem = {
        "type": "t",
        "title": "t",
        "status": 422,
        "detail": "é \ud800",
        "errors": [{"pointer": "/\ud800", "detail": "d"}],
    }
    batch = Batch(accepted=0, refused=1, data=[BatchRefused(status=422, problem=problem)])

    assert json.loads(to_json(batch))["data"][0]["problem"] == problem
    assert to_json(batch).isascii()
    assert to_plain(batch)["data"][0]["problem"] == problem


def test_a_place_in_the_queue_tells_the_median_and_nine_in_ten():
    place = queue_view(Place(jobs_ahead=3, eta=Eta(p50_s=1.234, p90_s=5.678)))

    assert place == QueuePlace(jobs_ahead=3, eta_p50_s=1.23, eta_p90_s=5.68)
    assert queue_view(None) is None
