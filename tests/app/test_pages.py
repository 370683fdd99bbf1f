"""Where the next page of a list begins, and the link to it."""

import uuid
from urllib.parse import parse_qs, urlsplit

import pytest
from flask import Flask, request

from app.http.pages import cursor_of, next_page, read_cursor, read_limit
from app.problems import InvalidQuery

IDS = [uuid.UUID(int=number) for number in (9, 8, 7, 6)]
FURTHER = uuid.UUID(int=3)


@pytest.fixture
def asked():
    """The next page of a list that was asked for with some parameters, and its link: by ids and what `next_page` takes."""
    app = Flask(__name__)
    app.add_url_rule("/lists/<int:which>", "show_list", lambda which: "")

    def asked(ids, **options):
        with app.test_request_context("/lists/7?limit=3&state=canceled&endpoint=x&cursor=old"):
            return next_page(request, ids, 3, **options)

    return asked


@pytest.mark.parametrize(
    ("ids", "more_before", "begins_behind"),
    [
        (IDS, None, IDS[2]),
        (IDS, FURTHER, IDS[2]),
        (IDS[:3], None, None),
        (IDS[:2], None, None),
        ([], None, None),
        (IDS[:2], FURTHER, FURTHER),
        ([], FURTHER, FURTHER),
    ],
)
def test_a_next_page_begins_behind_the_last_row_or_where_the_search_stopped(
    asked,
    ids,
    more_before,
    begins_behind,
):
    cursor, headers = asked(ids, more_before=more_before)

    assert cursor == (cursor_of(begins_behind) if begins_behind else None)
    assert set(headers) == ({"Link"} if begins_behind else set())


def test_a_link_to_the_next_page_asks_for_the_same_behind_another_row(asked):
    cursor, headers = asked(IDS)

    url, _, rel = headers["Link"].partition(">; ")
    parts = urlsplit(url.removeprefix("<"))
    assert (parts.path, rel) == ("/lists/7", 'rel="next"')
    assert parse_qs(parts.query) == {
        "limit": ["3"],
        "state": ["canceled"],
        "endpoint": ["x"],
        "cursor": [cursor],
    }


@pytest.mark.parametrize("name", ["limit", "cursor"])
def test_a_page_is_asked_for_once(name):
    read = {"limit": read_limit, "cursor": read_cursor}[name]
    value = {"limit": "3", "cursor": cursor_of(FURTHER)}[name]

    with Flask(__name__).test_request_context(f"/?{name}={value}"):
        assert read(request) == {"limit": 3, "cursor": FURTHER}[name]
    twice = Flask(__name__).test_request_context(f"/?{name}={value}&{name}={value}")
    with twice, pytest.raises(InvalidQuery, match="2 times") as refusal:
        read(request)
    assert refusal.value.members["parameter"] == name
