"""data: URLs, read as browsers read them."""

import base64
import textwrap
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.services.dataurls import Unreadable, decoded, is_one
from tests.pictures import png

PICTURE = png()
TEXT = base64.b64encode(PICTURE).decode()


@pytest.mark.parametrize(
    "url",
    [
        pytest.param(f"data:image/png;base64,{TEXT}", id="plain"),
        pytest.param(
            "data:image/png;base64," + "\n".join(textwrap.wrap(TEXT, 76)),
            id="wrapped at 76, as the command base64 does",
        ),
        pytest.param(
            "data:image/png;base64," + "\r\n".join(textwrap.wrap(TEXT, 64)) + "\r\n", id="CRLF"
        ),
        pytest.param(f"data:image/png;base64,{TEXT}\n", id="a newline behind it"),
        pytest.param(f" \tdata:image/png;base64, {TEXT}", id="spaces around it"),
        pytest.param(f"data:image/png;base64,{TEXT.rstrip('=')}", id="no padding"),
        pytest.param(f"data:;base64,{TEXT}", id="no type"),
        pytest.param(f"data:;charset=x;base64,{TEXT}", id="no type and a parameter"),
        pytest.param(f"DATA:IMAGE/PNG;BASE64,{TEXT}", id="capitals"),
        pytest.param(f"data:image/png; base64 ,{TEXT}", id="spaces at the mark"),
        pytest.param(f"data:image/png;name=a.png;base64,{TEXT}", id="a parameter"),
        pytest.param(f"data:image/vnd.adobe.photoshop+x;base64,{TEXT}", id="an odd type"),
        pytest.param(f"data:application/octet-stream;base64,{TEXT}", id="any bytes"),
        pytest.param(
            "data:image/png;base64," + quote(TEXT, safe=""), id="base64 in percent-encoding"
        ),
        pytest.param(f"data:image/png;base64,{TEXT}#fragment", id="a fragment"),
        pytest.param("data:image/png," + quote(PICTURE), id="percent-encoding alone"),
    ],
)
def test_a_data_url_holds_its_picture(url):
    assert is_one(url)
    assert decoded(url) == PICTURE


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("data:", "without a comma"),
        ("data:image/png;base64", "without a comma"),
        ("data:" + "x" * 5000 + ",", "without a comma"),
        ("data:text/html;base64,AAAA", "of 'text/html', not of a picture"),
        ("data:image/png;base64,A", "whose base64 is damaged"),
        ("data:image/png;base64,AAAA=", "whose base64 is damaged"),
        ("data:image/png;base64,AA-_", "whose base64 is damaged"),
        ("data:image/png;base64,AAé=", "whose base64 is damaged"),
        ("data:image/png;base64,\ud800AAA", "whose base64 is damaged"),
    ],
)
def test_one_that_cannot_be_read_says_why(url, why):
    with pytest.raises(Unreadable, match=why):
        decoded(url)


@given(content=st.binary(max_size=200), at=st.lists(st.integers(0, 300), max_size=5))
def test_white_space_and_padding_do_not_matter(content, at):
    text = base64.b64encode(content).decode()
    for place in sorted(at):
        text = text[:place] + " \n\r\t\f"[place % 5] + text[place:]

    assert (
        decoded(f"data:;base64,{text}")
        == decoded(f"data:;base64,{text.replace('=', '')}")
        == content
    )


@given(st.text(max_size=60))
def test_whatever_comes_is_bytes_or_unreadable(text):
    for url in ("data:" + text, "data:;base64," + text):
        try:
            assert isinstance(decoded(url), bytes)
        except Unreadable:
            continue
