"""The object store: what is put can be read, by others only through a URL that we signed."""

import uuid

import httpx
import pytest

from edges.objectstore import ObjectStore, StoreUnavailable, content_sha256, image_key
from settings import StoreSettings
from tests.builders import a_closed_port


@pytest.fixture(scope="module")
def store(settings) -> ObjectStore:
    return ObjectStore(settings)


@pytest.fixture
def key() -> str:
    return image_key(uuid.uuid4(), content_sha256(uuid.uuid4().bytes), "png")


def changed(settings: StoreSettings, **changes) -> ObjectStore:
    return ObjectStore(StoreSettings(**{**settings.model_dump(), **changes}))


def fetch(url: str) -> httpx.Response:
    return httpx.get(url, trust_env=False)


def test_an_object_comes_back_as_it_was_put(store, key):
    store.put(key, b"an image", content_type="image/png")

    assert store.get(key) == b"an image"


def test_putting_the_same_key_twice_is_putting_it_once(store, key):
    store.put(key, b"an image", content_type="image/png")
    store.put(key, b"an image", content_type="image/png")

    assert store.get(key) == b"an image"


def test_a_key_that_is_not_there_is_an_error_with_a_name(store, key):
    with pytest.raises(StoreUnavailable, match=r"^GetObject: NoSuchKey$"):
        store.get(key)


def test_a_key_is_there_from_its_put_to_its_end(store, key):
    assert not store.holds(key)
    store.put(key, b"an image", content_type="image/png")
    assert store.holds(key)
    store.delete(key)
    assert not store.holds(key)


def test_keys_are_content_addressed_and_scoped_to_the_tenant():
    tenant_id = uuid.UUID(int=7)

    assert image_key(tenant_id, "ab" * 32, "webp") == f"t/{tenant_id}/sha256/ab/{'ab' * 32}.webp"


def test_a_presigned_url_shows_the_object_to_whoever_has_it(store, key):
    store.put(key, b"an image", content_type="image/png")

    answer = fetch(store.presigned_url(key, content_type="image/png", filename="job-0.png"))

    assert (answer.status_code, answer.content, answer.headers["content-type"]) == (
        200,
        b"an image",
        "image/png",
    )


def test_without_the_signature_nothing_is_shown(store, key):
    store.put(key, b"an image", content_type="image/png")
    url = httpx.URL(store.presigned_url(key, content_type="image/png", filename="job-0.png"))

    assert fetch(str(url.copy_with(query=None))).status_code in (400, 403)


@pytest.mark.parametrize(
    "part", ["X-Amz-Signature", "X-Amz-Expires", "X-Amz-Date", "X-Amz-Credential"]
)
def test_a_tampered_url_shows_nothing(store, key, part):
    store.put(key, b"an image", content_type="image/png")
    url = httpx.URL(store.presigned_url(key, content_type="image/png", filename="job-0.png"))
    value = url.params[part]

    tampered = url.copy_set_param(part, value[:-1] + ("1" if value[-1] != "1" else "2"))

    assert fetch(str(tampered)).status_code in (400, 403)


def test_a_url_for_one_object_does_not_open_another(store, key):
    other = image_key(uuid.uuid4(), content_sha256(b"other"), "png")
    store.put(key, b"an image", content_type="image/png")
    store.put(other, b"another tenant's", content_type="image/png")

    url = store.presigned_url(key, content_type="image/png", filename="job-0.png").replace(
        key, other
    )

    assert fetch(url).status_code == 403


def test_urls_are_signed_for_the_address_that_clients_can_reach(settings, key):
    store = changed(settings, s3_public_endpoint_url="https://images.example.com")

    assert store.presigned_url(key, content_type="image/png", filename="x.png").startswith(
        f"https://images.example.com/{settings.s3_bucket}/t/"
    )


def test_a_refusal_tells_what_was_refused_and_no_signature(settings, key):
    store = changed(settings, s3_secret_access_key="not the secret")

    with pytest.raises(StoreUnavailable) as refusal:
        store.put(key, b"an image", content_type="image/png")

    assert str(refusal.value) == "PutObject: SignatureDoesNotMatch"


def test_a_store_that_is_away_says_so_and_tells_no_address(settings, key):
    store = changed(settings, s3_endpoint_url=f"http://127.0.0.1:{a_closed_port()}")

    with pytest.raises(StoreUnavailable) as refusal:
        store.get(key)

    assert str(refusal.value) == "EndpointConnectionError"


@pytest.mark.parametrize(
    ("style", "address"),
    [
        ("auto", "http://objects.example:81/pictures/"),
        ("path", "http://objects.example:81/pictures/"),
        ("virtual", "http://pictures.objects.example:81/"),
    ],
)
def test_the_bucket_is_in_the_path_or_in_the_host_s_name_as_the_store_wants_it(
    settings, key, style, address
):
    store = changed(
        settings,
        s3_bucket="pictures",
        s3_public_endpoint_url="http://objects.example:81",
        s3_addressing_style=style,
    )

    assert store.presigned_url(key, content_type="image/png", filename="1.png").startswith(address)
