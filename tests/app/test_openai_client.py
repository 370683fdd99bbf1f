"""The official `openai` client, unmodified, against the running stack."""

import base64
import io
import itertools
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from sqlalchemy import text

from models import api_keys, tenants
from models.database import transaction
from tests.app.conftest import bearer
from tests.builders import until

PROMPT = "a large red circle in the center on a blue background"


@pytest.fixture(scope="module")
def key(new_key) -> str:
    return new_key()


@pytest.fixture(scope="module")
def client(stack, key) -> openai.OpenAI:
    return a_client(stack, key)


@pytest.fixture(scope="module")
def rest(stack, key):
    with httpx.Client(
        base_url=stack.env["DARKROOM_URL"], headers=bearer(key), timeout=90, trust_env=False
    ) as rest:
        yield rest


def a_client(stack, key, **options) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{stack.env['DARKROOM_URL']}/v1",
        api_key=key,
        **{"max_retries": 0, "timeout": 120, **options},
    )


def decoded(b64_json) -> np.ndarray:
    return np.asarray(
        Image.open(io.BytesIO(base64.b64decode(b64_json))).convert("RGB"), dtype=float
    )


def distance(one, other) -> float:
    return float(np.abs(one - other).mean())


def a_picture(mode="RGB", colour=(40, 90, 200), size=(128, 128)) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def a_mask() -> bytes:
    """Transparent, that is to be repainted, in the right half."""
    mask = Image.new("RGBA", (128, 128), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (64, 0, 128, 128))
    buffer = io.BytesIO()
    mask.save(buffer, "PNG")
    return buffer.getvalue()


def jobs_of(rest) -> list[dict]:
    return rest.get("/v1/jobs", params={"limit": 100}).json()["data"]


def test_generate_gives_images_and_our_own_members(client, rest):
    answer = client.images.generate(
        model="pocket",
        prompt=PROMPT,
        n=2,
        size="128x128",
        extra_body={"seed": 7, "steps": 4, "tier": "fast", "guidance": 2.0},
    )

    first, second = answer.data
    assert decoded(first.b64_json).shape == (128, 128, 3)
    assert (first.seed, second.seed) == (7, 8)
    assert (answer.seed, answer.steps, answer.tier, answer.guidance, answer.model_version) == (
        7,
        4,
        "fast",
        2.0,
        "1",
    )
    assert (answer.size, answer.output_format, answer.background) == ("128x128", "png", "opaque")
    job = rest.get(f"/v1/jobs/{answer.job_id}").json()
    assert [image["pixels_sha256"] for image in job["images"]] == [
        first.pixels_sha256,
        second.pixels_sha256,
    ]


def test_an_image_can_be_had_as_a_url(client):
    answer = client.images.generate(
        prompt=PROMPT, response_format="url", output_format="webp", extra_body={"steps": 2}
    )

    got = httpx.get(answer.data[0].url, trust_env=False)

    assert got.headers["Content-Type"] == "image/webp"
    assert Image.open(io.BytesIO(got.content)).size == (128, 128)


@pytest.mark.parametrize("model", ["gpt-image-1", "dall-e-3"])
def test_a_program_gets_images_by_the_model_that_it_has_built_in(client, rest, model):
    answer = client.images.generate(model=model, prompt=PROMPT, size="128x128")

    job = rest.get(f"/v1/jobs/{answer.job_id}").json()
    assert (
        (answer.model, answer.model_alias)
        == (job["model"], job["model_alias"])
        == ("pocket", model)
    )
    assert client.models.retrieve(model).id == model
    assert model in [listed.id for listed in client.models.list()]


def test_a_program_of_the_days_of_dall_e_reads_a_url_that_opens(client):
    """As LangChain's DallEAPIWrapper asks: no response_format, and nothing but `url` is read."""
    answer = client.images.generate(
        model="dall-e-3", prompt=PROMPT, size="128x128", quality="standard", n=1
    )

    shown = httpx.get(answer.data[0].url, trust_env=False)
    assert (shown.status_code, shown.headers["Content-Type"]) == (200, "image/png")
    assert answer.data[0].b64_json is None


def test_the_alias_is_in_the_audit_log_and_in_a_replay(client, rest, stack_database):
    job_id = client.images.generate(model="dall-e-3", prompt=PROMPT, extra_body={"steps": 2}).job_id

    replayed = rest.post(f"/v1/jobs/{job_id}/replay").json()

    assert (replayed["model"], replayed["model_alias"]) == ("pocket", "dall-e-3")
    with transaction(stack_database) as session:
        query = "SELECT facts FROM audit_log WHERE job_id = :id AND event = 'job:request:accepted'"
        assert session.scalar(text(query), {"id": job_id})["model_alias"] == "dall-e-3"


def test_quality_chooses_the_tier(client):
    low = client.images.generate(prompt=PROMPT, quality="low")
    high = client.images.generate(prompt=PROMPT, quality="high", extra_body={"steps": 2})

    assert (low.tier, low.quality, high.tier, high.quality) == ("fast", "low", "quality", "high")


def test_models_are_listed_and_shown(client):
    assert next(iter(client.models.list())).id == "pocket"
    assert client.models.retrieve("pocket").owned_by == "darkroom"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("sora-2")


def test_an_edit_stays_near_its_picture_the_nearer_the_weaker(client):
    picture = a_picture()

    near = client.images.edit(
        image=picture,
        prompt=PROMPT,
        extra_body={"strength": 0.1, "steps": 20, "seed": 1, "tier": "quality"},
    )
    far = client.images.edit(
        image=picture,
        prompt=PROMPT,
        extra_body={"strength": 0.95, "steps": 20, "seed": 1, "tier": "quality"},
    )

    start = np.asarray(Image.open(io.BytesIO(picture)), dtype=float)
    assert (
        distance(decoded(near.data[0].b64_json), start)
        < 15
        < distance(decoded(far.data[0].b64_json), start)
    )
    assert (near.strength, far.strength) == (0.1, 0.95)


def test_an_edit_with_a_mask_repaints_where_that_is_transparent(client):
    picture = a_picture()

    answer = client.images.edit(
        image=("photo.png", picture, "image/png"),
        mask=a_mask(),
        prompt=PROMPT,
        size="auto",
        extra_body={"steps": 8, "seed": 3},
    )

    start, edited = (
        np.asarray(Image.open(io.BytesIO(picture)), dtype=float),
        decoded(answer.data[0].b64_json),
    )
    kept, repainted = (
        distance(edited[:, :48], start[:, :48]),
        distance(edited[:, 80:], start[:, 80:]),
    )
    assert kept < 20 < 30 < repainted  # what the VAE alone does to a plain colour is 12
    assert answer.strength == 1.0


def test_a_list_of_one_picture_will_do_and_of_two_is_refused(client):
    answer = client.images.edit(image=[a_picture()], prompt=PROMPT, extra_body={"steps": 2})
    assert answer.data

    with pytest.raises(openai.BadRequestError, match="one picture at a time") as refusal:
        client.images.edit(image=[a_picture(), a_picture()], prompt=PROMPT)
    assert refusal.value.param == "image"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_variations_differ_from_each_other_and_not_too_much_from_their_picture(client):
    drawn = client.images.generate(prompt=PROMPT, extra_body={"seed": 7, "tier": "quality"})
    picture = base64.b64decode(drawn.data[0].b64_json)

    answer = client.images.create_variation(image=picture, n=2, extra_body={"seed": 5, "steps": 8})

    one, other = (decoded(image.b64_json) for image in answer.data)
    assert distance(one, other) > 0
    assert answer.strength == 0.6


def test_a_stream_shows_three_partial_images_that_are_made_of_its_latents(client):
    events = list(
        client.images.generate(
            prompt=PROMPT,
            stream=True,
            partial_images=3,
            extra_body={"steps": 60, "tier": "quality", "seed": 7, "guidance": 3},
        )
    )

    kinds = [event.type for event in events]
    assert kinds == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:3]] == [0, 1, 2]
    final = decoded(events[-1].b64_json)
    shown = [decoded(event.b64_json) for event in events[:3]]
    assert distance(shown[0], shown[1]) > 0 < distance(shown[1], shown[2])
    height, width, _ = shown[2].shape
    small = np.asarray(Image.fromarray(final.astype("uint8")).resize((width, height)), dtype=float)
    # colours by a linear guess from the latents
    assert distance(shown[2], small) < distance(np.full_like(small, 128), small)
    assert events[-1].seed == 7
    usage = events[-1].usage
    assert usage.total_tokens == usage.input_tokens == usage.input_tokens_details.text_tokens > 0
    assert {event.output_format for event in events} == {"png"}


def test_an_edit_streams_too(client):
    events = list(
        client.images.edit(
            image=a_picture(),
            prompt=PROMPT,
            stream=True,
            partial_images=1,
            extra_body={"steps": 20},
        )
    )

    assert events[-1].type == "image_edit.completed"
    assert {event.type for event in events[:-1]} <= {"image_edit.partial_image"}
    assert decoded(events[-1].b64_json).shape == (128, 128, 3)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": "x", "output_format": "svg"}, "output_format"),
        ({"prompt": "x", "output_format": "gif"}, "output_format"),
        ({"prompt": "x", "background": "transparent"}, "background"),
        ({"prompt": "x", "n": 11}, "n"),
        ({"prompt": "x", "size": "1024x1024"}, "size"),
        ({"prompt": "x", "quality": "superb"}, "quality"),
        ({"prompt": "x", "output_compression": 50}, "output_compression"),
        ({"prompt": "x", "extra_body": {"steps": 0}}, "steps"),
        ({"prompt": "x", "extra_body": {"stepz": 3}}, "stepz"),
        ({"prompt": "", "extra_body": {}}, "prompt"),
        ({"prompt": "x", "extra_body": {"frame_count": 4}}, "frame_count"),
    ],
)
def test_a_parameter_that_is_wrong_or_not_offered_is_a_bad_request_that_names_it(
    client, fields, param
):
    with pytest.raises(openai.BadRequestError) as refusal:
        client.images.generate(**fields)

    assert refusal.value.param == param
    assert refusal.value.request_id


def test_a_refusal_s_message_names_each_wrong_field_and_what_is_accepted(client):
    with pytest.raises(openai.UnprocessableEntityError) as refusal:
        client.post("/jobs", body={"prompt": "x", "seed": "six", "stepz": 3}, cast_to=object)

    message = refusal.value.body["message"]
    assert "seed: Input should be a valid integer" in message
    assert "stepz: There is no such field (accepted: prompt, negative_prompt, " in message
    with pytest.raises(openai.BadRequestError) as refusal:
        client.images.generate(prompt="x", size="1024x1024")
    assert refusal.value.body["message"].count("128x128") == 1


def test_a_picture_that_is_none_is_a_bad_request(client):
    with pytest.raises(openai.BadRequestError) as refusal:
        client.images.edit(image=b"<svg xmlns='http://www.w3.org/2000/svg'/>", prompt=PROMPT)

    assert (refusal.value.param, refusal.value.code) == ("image", "invalid_picture")


def test_each_class_of_error_is_the_client_s_own(stack, client):
    with pytest.raises(openai.AuthenticationError):
        a_client(stack, "dr_nobody").images.generate(prompt=PROMPT)
    with pytest.raises(openai.NotFoundError) as refusal:
        client.images.generate(prompt=PROMPT, model="sora-2")
    assert "pocket" in refusal.value.message
    with pytest.raises(openai.NotFoundError):
        client.get(f"/jobs/{uuid.uuid4()}", cast_to=object)
    with pytest.raises(openai.UnprocessableEntityError):
        client.post("/jobs", body={"prompt": "x", "steps": 0}, cast_to=object)
    job = client.post(
        "/jobs",
        body={"prompt": "x", "steps": 1},
        cast_to=object,
        options={"headers": {"Prefer": "wait=60"}},
    )
    with pytest.raises(openai.ConflictError):
        client.post(f"/jobs/{job['id']}/cancel", cast_to=object)


def test_a_call_that_times_out_is_tried_again_and_comes_to_the_same_job(stack, new_key):
    key = new_key()
    impatient = a_client(stack, key, max_retries=2, timeout=httpx.Timeout(120, read=0.7))

    with pytest.raises(openai.APITimeoutError):
        impatient.images.generate(prompt=PROMPT, extra_body={"tier": "batch", "steps": 60, "n": 8})

    with httpx.Client(
        base_url=stack.env["DARKROOM_URL"], headers=bearer(key), trust_env=False
    ) as rest:
        assert len(jobs_of(rest)) == 1
        rest.post(jobs_of(rest)[0]["urls"]["cancel"])


def test_two_first_tries_are_two_jobs_and_a_further_try_joins_the_last(rest):
    body = {"prompt": PROMPT, "steps": 3, "seed": 99}

    first, second = (
        rest.post("/v1/images/generations", json=body).json()["job_id"] for _ in range(2)
    )
    again = rest.post(
        "/v1/images/generations", json=body, headers={"X-Stainless-Retry-Count": "1"}
    ).json()["job_id"]

    assert first != second
    assert again == second


def test_a_further_try_whose_first_is_long_over_is_a_new_job(rest, stack_database):
    body = {"prompt": PROMPT, "steps": 2, "seed": 98}
    first = rest.post("/v1/images/generations", json=body).json()["job_id"]
    with transaction(stack_database) as session:
        session.execute(
            text(
                "UPDATE jobs SET finished_at = finished_at - interval '11 minutes' WHERE id = :id"
            ),
            {"id": first},
        )

    further = {"headers": {"X-Stainless-Retry-Count": "1"}}
    second, third = (
        rest.post("/v1/images/generations", json=body, **further).json()["job_id"] for _ in range(2)
    )

    assert second != first
    assert third == second


def test_a_further_try_joins_no_job_of_another_key(stack, stack_database, rest):
    with transaction(stack_database) as session:
        own = {"tenant_id": uuid.UUID(rest.get("/v1/key").json()["tenant_id"]), "name": "another"}
        _, other = api_keys.issue(session, **own, pepper=stack.env["API_KEY_PEPPER"], actor="tests")
    body = {"prompt": PROMPT, "steps": 1, "seed": 97}
    further = {"X-Stainless-Retry-Count": "1"}

    keys = ({}, bearer(other), {}, bearer(other))
    first, theirs, again, theirs_again = (
        rest.post("/v1/images/generations", json=body, headers={**further, **key}).json()["job_id"]
        for key in keys
    )

    assert first != theirs
    assert (again, theirs_again) == (first, theirs)


def test_adapters_that_an_edit_asks_for_are_read_out_of_its_form(client):
    with pytest.raises(
        openai.BadRequestError, match="adapters are not offered by model pocket"
    ) as refusal:
        client.images.edit(
            image=a_picture(),
            prompt=PROMPT,
            extra_body={"adapters": [{"name": "sepia", "strength": 0.5}]},
        )

    assert refusal.value.param == "adapters"


def test_a_file_that_nothing_reads_is_refused_and_not_passed_over(client):
    with pytest.raises(openai.BadRequestError) as refusal:
        client.images.edit(image=a_picture(), markup=a_picture(), prompt=PROMPT)

    assert refusal.value.param == "markup"


@pytest.mark.parametrize(("field", "value"), [("seed", 10**400), ("user", "a\x00b")])
def test_a_value_that_no_database_holds_is_a_bad_request(client, field, value):
    with pytest.raises(openai.BadRequestError) as refusal:
        client.images.generate(prompt=PROMPT, extra_body={field: value})

    assert refusal.value.param == field


def test_a_tenant_s_limits_are_the_client_s_own_errors(stack, stack_database):
    with transaction(stack_database) as session:
        tenant = tenants.create(session, name=f"app-{uuid.uuid4().hex[:8]}", actor="tests")
        tenants.limit(
            session,
            tenant,
            changes={"requests_per_minute": 2, "allowed_tiers": ["fast"]},
            actor="tests",
        )
        _, key = api_keys.issue(
            session,
            tenant_id=tenant.id,
            name="tests",
            pepper=stack.env["API_KEY_PEPPER"],
            actor="tests",
        )
    limited = a_client(stack, key)

    with pytest.raises(openai.PermissionDeniedError):
        limited.images.generate(prompt=PROMPT, extra_body={"tier": "batch"})
    limited.images.generate(prompt=PROMPT, extra_body={"tier": "fast", "steps": 2})
    with pytest.raises(openai.RateLimitError) as refusal:
        limited.images.generate(prompt=PROMPT)

    assert int(refusal.value.response.headers["Retry-After"]) >= 1


def test_a_client_that_leaves_its_stream_cancels_the_job(client, rest):
    stream = client.images.generate(
        prompt=PROMPT,
        stream=True,
        partial_images=3,
        extra_body={"tier": "batch", "steps": 60, "seed": 4711},
    )
    until(lambda: [job for job in jobs_of(rest) if job["seed"] == 4711])
    stream.response.close()

    [job] = [job for job in jobs_of(rest) if job["seed"] == 4711]
    ended = until(
        lambda: (
            (shown := rest.get(job["urls"]["self"]).json())["state"] in ("canceled", "succeeded")
            and shown
        ),
        within_s=60,
    )
    assert ended["state"] == "canceled"


def test_of_two_who_watch_one_job_only_the_last_to_leave_cancels_it(served, unserved, monkeypatch):
    monkeypatch.setattr("app.openai.stream.HEARTBEAT_S", 0.1)  # which shows that a client has left
    rest, parts = served(**unserved)
    tenant_id = uuid.UUID(rest.get("/v1/key").json()["tenant_id"])
    watch = {"method": "POST", "url": "/v1/images/generations"}
    watch["json"] = {"prompt": PROMPT, "stream": True, "tier": "batch", "seed": 4713}

    def watching() -> int:
        return parts.events._places.held_by(tenant_id)

    with rest.stream(**watch) as first:
        job = f"/v1/jobs/{first.headers['X-Darkroom-Job-Id']}"
        with rest.stream(**watch, headers={"X-Stainless-Retry-Count": "1"}) as second:
            assert second.headers["X-Darkroom-Job-Id"] == first.headers["X-Darkroom-Job-Id"]
            assert watching() == 2
        until(lambda: watching() == 1, within_s=60, what="noticing that one has left")
        assert rest.get(job).json()["state"] == "queued"

    until(lambda: rest.get(job).json()["state"] == "canceled", within_s=60, what="the cancel")


def test_a_job_that_was_asked_for_in_the_background_outlives_its_stream(client, rest):
    body = {"tier": "batch", "steps": 20, "seed": 4712, "background": True}
    stream = client.images.generate(prompt=PROMPT, stream=True, extra_body=body)
    until(lambda: [job for job in jobs_of(rest) if job["seed"] == 4712])
    stream.response.close()

    [job] = [job for job in jobs_of(rest) if job["seed"] == 4712]
    assert (
        rest.get(job["urls"]["self"], headers={"Prefer": "wait=60"}).json()["state"] == "succeeded"
    )


def test_a_canceled_job_ends_its_call_with_a_conflict_and_its_stream_with_an_error(client, rest):
    body = {"tier": "batch", "steps": 60, "n": 1}
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(
            client.images.generate, prompt=PROMPT, extra_body=body | {"seed": 815}
        )
        [job] = until(lambda: [job for job in jobs_of(rest) if job["seed"] == 815])
        rest.post(job["urls"]["cancel"])
        with pytest.raises(openai.ConflictError):
            call.result()

    stream = client.images.generate(prompt=PROMPT, stream=True, extra_body=body | {"seed": 816})
    [job] = until(lambda: [job for job in jobs_of(rest) if job["seed"] == 816])
    rest.post(job["urls"]["cancel"])
    with pytest.raises(openai.APIError, match="canceled"):
        list(stream)


def test_heartbeats_and_nothing_foreign_are_in_a_stream(rest):
    body = {"prompt": PROMPT, "stream": True, "tier": "batch", "steps": 60, "partial_images": 1}
    started = time.monotonic()

    with rest.stream("POST", "/v1/images/generations", json=body) as answer:
        lines = list(itertools.takewhile(lambda line: line != "data: [DONE]", answer.iter_lines()))

    assert answer.headers["Content-Type"].startswith("text/event-stream")
    assert all(line == "" or line.startswith((":", "data: {")) for line in lines)
    assert time.monotonic() - started < 60
