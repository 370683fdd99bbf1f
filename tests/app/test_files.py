"""Pictures that a tenant brings: kept once, shown, listed, erased; nobody else's business."""

import base64
import hashlib
import io
import uuid
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import httpx
import pytest
from sqlalchemy import text

from edges.objectstore import ObjectStore
from models.database import make_engine, transaction
from settings import StoreSettings
from tests.app.conftest import bearer
from tests.app.problem import assert_problem
from tests.builders import settings_for, until
from tests.pictures import a_picture, decoded, png

LOOPBACK = "127.0.0.1/32"


@pytest.fixture
def tenant(new_tenant):
    """HTTP as a tenant that has no files."""
    return new_tenant()


@pytest.fixture(scope="module")
def sql(stack):
    """The database as its owner: the gateway's own role may not read the audit log."""
    engine = make_engine(stack.env["MIGRATION_DATABASE_URL"], pool_size=1)

    def sql(query, **values):
        with transaction(engine) as session:
            result = session.execute(text(query), values)
            return [dict(row) for row in result.mappings()] if result.returns_rows else None

    yield sql
    engine.dispose()


def bring(tenant, content=None, **options):
    return tenant.post(
        "/v1/files", files={"file": ("picture", png() if content is None else content)}, **options
    )


def test_a_picture_that_the_store_has_lost_is_there_again_once_it_is_brought_again(
    tenant, stack, sql
):
    content = png(a_picture(40, 24, seed=5))
    file = bring(tenant, content).json()
    [row] = sql("SELECT object_key FROM files WHERE id = :id", id=file["id"])
    ObjectStore(settings_for(StoreSettings, stack.env)).delete(row["object_key"])

    again = bring(tenant, content).json()

    assert again["id"] == file["id"]
    assert fetched(tenant, again).status_code == 200


def fetched(tenant, file) -> httpx.Response:
    redirect = tenant.get(file["url"])
    assert (redirect.status_code, redirect.headers["Cache-Control"]) == (302, "no-store")
    return httpx.get(redirect.headers["Location"], trust_env=False)


def create(tenant, **fields):
    return tenant.post("/v1/jobs", json={"prompt": "a red circle", "tier": "batch", **fields})


def data_url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def error_of(problem):
    [error] = problem["errors"]
    return error


def test_a_picture_is_kept_and_comes_back_with_the_same_pixels(tenant):
    picture = a_picture(60, 40)

    answer = bring(tenant, png(picture))

    file = answer.json()
    assert (answer.status_code, answer.headers["Location"]) == (201, f"/v1/files/{file['id']}")
    assert (file["width_px"], file["height_px"], file["mode"], file["content_type"]) == (
        60,
        40,
        "RGB",
        "image/png",
    )
    content = fetched(tenant, file).content
    assert hashlib.sha256(content).hexdigest() == file["content_sha256"]
    assert len(content) == file["size_bytes"]
    assert decoded(content).tobytes() == picture.tobytes()
    assert tenant.get(file["urls"]["self"]).json() == file


@pytest.mark.parametrize("kind", ["image/png", "image/webp", "application/octet-stream"])
def test_the_picture_may_be_the_body_itself_whatever_it_is_called(tenant, kind):
    answer = tenant.post("/v1/files", content=png(), headers={"Content-Type": kind})

    assert answer.status_code == 201
    assert answer.json()["id"] == bring(tenant).json()["id"]


def test_the_same_picture_twice_is_one_file(tenant):
    first = bring(tenant, png(compress_level=9)).json()
    second = bring(tenant, png(compress_level=0)).json()

    assert first == second
    assert len(tenant.get("/v1/files").json()["data"]) == 1


def test_the_same_picture_many_times_at_once_is_one_file(tenant, sql):
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda _: bring(tenant), range(16)))

    assert {answer.status_code for answer in answers} == {201}
    [file_id] = {answer.json()["id"] for answer in answers}
    stored = (
        "SELECT count(*) FROM audit_events WHERE event = 'file:content:stored' "
        "AND facts ->> 'file_id' = :id"
    )
    assert sql(stored, id=file_id) == [{"count": 1}]


def test_the_same_picture_of_two_tenants_is_two_files(tenant, stranger):
    assert bring(tenant).json()["id"] != bring(stranger).json()["id"]


def test_another_tenant_s_file_is_not_there(tenant, stranger):
    file = bring(tenant).json()

    for answer in (
        stranger.get(file["urls"]["self"]),
        stranger.get(file["url"]),
        stranger.delete(file["urls"]["self"]),
    ):
        assert_problem(answer, 404, "file-not-found")
    answer = create(stranger, init_image=file["id"])
    assert (
        error_of(assert_problem(answer, 422, "invalid-image-request"))["pointer"] == "/init_image"
    )
    assert tenant.get(file["urls"]["self"]).status_code == 200


def test_without_a_key_nothing_is_kept(nobody):
    assert_problem(bring(nobody), 401, "unauthenticated")


def test_files_are_listed_newest_first_page_by_page(tenant):
    ids = [bring(tenant, png(a_picture(10 + place, 10))).json()["id"] for place in range(5)]

    first = tenant.get("/v1/files", params={"limit": 3})
    second = tenant.get(first.links["next"]["url"])

    assert [file["id"] for file in first.json()["data"] + second.json()["data"]] == ids[::-1]
    assert (first.json()["has_more"], second.json()["has_more"], second.json()["next_cursor"]) == (
        True,
        False,
        None,
    )
    assert_problem(tenant.get("/v1/files", params={"limit": 0}), 422, "invalid-query")
    assert_problem(tenant.get("/v1/files", params={"cursor": "?"}), 422, "invalid-query")


@pytest.mark.parametrize(
    "fields", [{}, {"picture": ("a", b"x")}, [("file", ("a", png())), ("file", ("b", png()))]]
)
def test_a_form_has_one_picture_in_the_field_file(tenant, fields):
    fields = fields or {"": ("a", b"x")}

    assert_problem(tenant.post("/v1/files", files=fields), 400, "malformed-body")


def test_a_file_input_that_nobody_filled_in_is_no_picture(tenant):
    empty = b'--x\r\nContent-Disposition: form-data; name="file"; filename=""\r\n\r\n\r\n--x--\r\n'
    answer = tenant.post(
        "/v1/files", content=empty, headers={"Content-Type": "multipart/form-data; boundary=x"}
    )

    assert "there are 0" in assert_problem(answer, 400, "malformed-body")["detail"]


def test_form_parts_that_nothing_reads_are_refused_and_openai_s_purpose_is_let_be(tenant):
    assert bring(tenant, data={"purpose": "vision"}).status_code == 201
    assert (
        "'expires'"
        in assert_problem(bring(tenant, data={"expires": "1"}), 400, "malformed-body")["detail"]
    )
    two = tenant.post("/v1/files", files={"file": ("a", png()), "mask": ("b", png())})
    assert "'mask'" in assert_problem(two, 400, "malformed-body")["detail"]


def test_a_body_of_another_kind_is_refused_and_says_which_ones_are_not(tenant):
    problem = assert_problem(
        tenant.post("/v1/files", json={"file": "x"}), 415, "unsupported-media-type"
    )

    assert "image/png" in problem["accepted"]


def in_pieces(content: bytes):
    for place in range(0, len(content), 65_536):
        yield content[place : place + 65_536]


@pytest.mark.parametrize("as_form", [True, False])
@pytest.mark.parametrize("in_chunks", [True, False])
def test_an_upload_that_is_too_large_is_refused(tenant, as_form, in_chunks):
    request = tenant.build_request("POST", "/v1/files", files={"file": ("a", b"\0" * 34_000_000)})
    content, kind = (
        (request.read(), request.headers["Content-Type"])
        if as_form
        else (b"\0" * 34_000_000, "image/png")
    )

    answer = tenant.post(
        "/v1/files",
        content=in_pieces(content) if in_chunks else content,
        headers={"Content-Type": kind},
    )

    assert_problem(answer, 413, "body-too-large")


def test_an_upload_of_unknown_length_is_kept(tenant):
    answer = tenant.post(
        "/v1/files", content=in_pieces(png()), headers={"Content-Type": "image/png"}
    )

    assert answer.status_code == 201


def test_other_routes_do_not_take_bodies_of_that_size(tenant):
    answer = create(tenant, prompt="x" * 5_000_000)

    assert_problem(answer, 413, "body-too-large")


def test_an_erased_file_is_gone_and_erasing_it_again_is_harmless(tenant, sql):
    file = bring(tenant, png(a_picture(33, 21))).json()
    location = tenant.get(file["url"]).headers["Location"]

    answers = [tenant.delete(file["urls"]["self"]) for _ in range(2)]

    assert [answer.status_code for answer in answers] == [204, 204]
    for path in (file["urls"]["self"], file["url"]):
        assert_problem(tenant.get(path), 404, "file-not-found")
    assert tenant.get("/v1/files").json()["data"] == []
    until(
        lambda: httpx.get(location, trust_env=False).status_code == 404,
        within_s=60,
        what="the object's end",
    )
    events = "SELECT event FROM audit_events WHERE facts ->> 'file_id' = :id ORDER BY seq"
    assert [row["event"] for row in sql(events, id=file["id"])] == [
        "file:content:stored",
        "file:content:erased",
    ]
    assert_problem(tenant.delete(f"/v1/files/{uuid.uuid4()}"), 404, "file-not-found")


def test_an_erased_picture_can_be_brought_again(tenant):
    first = bring(tenant).json()
    tenant.delete(first["urls"]["self"])

    second = bring(tenant).json()

    assert second["id"] != first["id"]
    assert second["content_sha256"] == first["content_sha256"]
    assert hashlib.sha256(fetched(tenant, second).content).hexdigest() == second["content_sha256"]


def test_an_image_that_was_brought_back_as_a_picture_outlives_the_file(new_tenant):
    tenant = new_tenant()
    job_body = {"prompt": "a red circle", "steps": 1}
    job = tenant.post("/v1/jobs", json=job_body, headers={"Prefer": "wait=60"}).json()
    file = bring(tenant, fetched(tenant, job["images"][0]).content).json()
    assert file["content_sha256"] == job["images"][0]["content_sha256"], "one object for both"

    tenant.delete(file["urls"]["self"])
    marker = bring(tenant).json()
    gone = tenant.get(marker["url"]).headers["Location"]
    tenant.delete(marker["urls"]["self"])
    until(lambda: httpx.get(gone, trust_env=False).status_code == 404, within_s=60, what="tidying")

    assert fetched(tenant, job["images"][0]).status_code == 200


def test_a_file_that_an_unfinished_job_starts_from_is_not_erased(tenant):
    file = bring(tenant).json()
    job = create(tenant, init_image=file["id"], steps=60, n=8).json()

    assert (
        assert_problem(tenant.delete(file["urls"]["self"]), 409, "file-in-use")["job_id"]
        == job["id"]
    )
    tenant.post(job["urls"]["cancel"])
    assert tenant.delete(file["urls"]["self"]).status_code == 204


def test_a_data_url_is_kept_as_a_file(tenant):
    job = create(
        tenant, init_image=data_url(png(a_picture(50, 50)), "image/webp"), strength=0.5
    ).json()

    file = tenant.get(f"/v1/files/{job['init_image']}").json()
    assert (file["width_px"], file["height_px"]) == (50, 50)
    tenant.post(job["urls"]["cancel"])


def test_a_data_url_of_some_megabytes_is_taken(tenant):
    job = create(tenant, init_image=data_url(png(a_picture(800, 1200), compress_level=0))).json()

    assert job["init_image"], job
    tenant.post(job["urls"]["cancel"])


@pytest.mark.parametrize(
    "value",
    [
        "",
        "no-id",
        "data:",
        "data:image/png;base64",
        "data:text/html;base64,AAAA",
        "data:image/png;base64,A",
        "data:image/png;base64,AA-_",
        "data:image/png;base64,AAAA%3D",
        "ftp://example.com/a.png",
        "file:///etc/passwd",
        "00000000-0000-7000-8000-000000000000",
    ],
)
@pytest.mark.parametrize("field", ["init_image", "mask"])
def test_a_value_that_stands_for_no_picture_is_refused_with_the_ones_that_would(
    tenant, field, value
):
    start = {"init_image": bring(tenant).json()["id"]} if field == "mask" else {}

    error = error_of(
        assert_problem(create(tenant, **start, **{field: value}), 422, "invalid-image-request")
    )

    assert error["pointer"] == f"/{field}"
    assert len(error["accepted"]) == 2


def test_a_picture_that_the_model_could_not_follow_is_not_looked_at(tenant):
    error = error_of(
        assert_problem(create(tenant, control_image="no-id"), 422, "invalid-image-request")
    )

    assert (error["pointer"], "cannot be used with model" in error["detail"]) == (
        "/control_image",
        True,
    )


@pytest.mark.parametrize("content", [b"", b"<svg/>", png()[:100]])
def test_a_data_url_of_no_picture_names_its_field(tenant, content):
    problem = assert_problem(create(tenant, init_image=data_url(content)), 422, "invalid-picture")

    assert error_of(problem)["pointer"] == "/init_image"
    assert problem["accepted"]["formats"] == ["PNG", "JPEG", "WebP"]


def test_a_mask_has_the_shape_of_the_picture_it_lies_on(tenant):
    picture, mask = (
        bring(tenant, png(a_picture(90, 60))).json(),
        bring(tenant, png(a_picture(45, 30))).json(),
    )
    other = bring(tenant, png(a_picture(60, 90))).json()

    job = create(tenant, init_image=picture["id"], mask=mask["id"]).json()
    refused = create(tenant, init_image=picture["id"], mask=other["id"])

    assert job["mask"] == mask["id"]
    tenant.post(job["urls"]["cancel"])
    assert error_of(assert_problem(refused, 422, "invalid-image-request"))["pointer"] == "/mask"


@pytest.fixture(scope="module")
def elsewhere_on_the_web():
    """The URL of a server that has /picture, /text, /away (a redirect) and /huge."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(
                {"/picture": 200, "/text": 200, "/huge": 200, "/away": 302}.get(self.path, 404)
            )
            self.send_header("Location", "/picture")
            self.end_headers()
            if self.path in ("/picture", "/text"):
                self.wfile.write(png(a_picture(70, 30)) if self.path == "/picture" else b"hello")
            if self.path == "/huge":
                try:
                    for _ in range(600):
                        self.wfile.write(b"\0" * 65_536)
                except OSError:
                    pass

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def fetching(gateway_with, new_key, sql):
    """Ask for a job by URL as a tenant that may have pictures fetched, from this machine."""

    def fetching(url, *, may=True, networks=LOOPBACK):
        key = new_key()
        kid = "SELECT tenant_id FROM api_keys ORDER BY created_at DESC LIMIT 1"
        sql(f"UPDATE tenants SET url_inputs = :may WHERE id = ({kid})", may=may)
        client = gateway_with(outbound_allowed_networks=networks)
        return client.post(
            "/v1/jobs",
            json={"prompt": "a dot", "tier": "batch", "init_image": url},
            headers=bearer(key),
        )

    return fetching


def test_a_picture_is_fetched_for_a_tenant_that_may(fetching, elsewhere_on_the_web):
    answer = fetching(f"{elsewhere_on_the_web}/picture")

    assert answer.status_code == 202, answer.json
    assert uuid.UUID(answer.json["init_image"])


@pytest.mark.parametrize("path", ["/text", "/nothing", "/away", "/huge"])
def test_a_url_that_cannot_be_fetched_or_holds_no_picture_is_refused(
    fetching, elsewhere_on_the_web, path
):
    answer = fetching(elsewhere_on_the_web + path)

    assert answer.status_code == 422
    assert answer.json["errors"][0]["pointer"] == "/init_image"
    assert elsewhere_on_the_web not in str(answer.json)


def test_nothing_is_fetched_for_a_tenant_that_may_not(fetching, elsewhere_on_the_web):
    answer = fetching(f"{elsewhere_on_the_web}/picture", may=False)

    assert answer.status_code == 422
    assert "POST /v1/files" in answer.json["detail"]


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/picture",
        "https://127.0.0.1/picture",
        "https://localhost/picture",
        "https://[::1]/picture",
        "https://2130706433/picture",
        "https://169.254.169.254/latest/meta-data",
        "https://10.0.0.1/picture",
        "https://user:password@example.com/picture",
        "https://example.com:22/picture",
        "https://",
    ],
)
def test_private_addresses_are_reached_for_nobody(fetching, url):
    answer = fetching(url, networks="")

    assert answer.status_code == 422
    assert answer.json["errors"][0]["pointer"] == "/init_image"


def test_a_store_that_is_away_is_said_and_leaves_no_file(gateway_with, new_key, elsewhere, sql):
    client, key = gateway_with(**elsewhere("object_store")), new_key()

    answer = client.post(
        "/v1/files", data={"file": (io.BytesIO(png()), "a.png")}, headers=bearer(key)
    )

    assert (answer.status_code, answer.json["part"]) == (503, "object_store")
    assert client.get("/v1/files", headers=bearer(key)).json["data"] == []
