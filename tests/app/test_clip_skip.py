"""clip_skip, the youngest parameter, from the request to the pixels and back.

Also a recipe for the next one.
"""

import json

import openai
import pytest
from click.testing import CliRunner
from sqlalchemy import text

from cli.main import darkroom
from models.database import transaction
from tests.app.conftest import bearer
from tests.app.problem import assert_problem
from tests.builders import a_fleet

REFUSED = "invalid-image-request"
BODY = {"prompt": "a large red circle on a blue background", "tier": "quality", "steps": 4}
BODY |= {"seed": 7}
WAIT = {"Prefer": "wait=60"}


def pixels_of(answer) -> str:
    job = answer.json()
    assert job["state"] == "succeeded", job
    return job["images"][0]["pixels_sha256"]


def made(api, **fields):
    return api.post("/v1/jobs", json=BODY | fields, headers=WAIT)


def test_it_changes_the_pixels_and_is_replayed(api):
    plain, none, skipped = made(api), made(api, clip_skip=0), made(api, clip_skip=1)

    again = api.post(f"/v1/jobs/{skipped.json()['id']}/replay", headers=WAIT)

    assert [answer.json()["clip_skip"] for answer in (plain, none, skipped, again)] == [
        None,
        0,
        1,
        1,
    ]
    assert pixels_of(plain) == pixels_of(none) != pixels_of(skipped) == pixels_of(again)


def test_it_is_estimated_and_shown_in_the_history(api, stack_database):
    estimate = api.post("/v1/estimate", json=BODY | {"clip_skip": 1}).json()
    job = made(api, clip_skip=1).json()

    with transaction(stack_database) as session:
        query = text("SELECT clip_skip FROM job_history WHERE job_id = :id")
        shown = session.scalar(query, {"id": job["id"]})
    assert (estimate["clip_skip"], shown) == (1, 1)


def test_openai_s_clients_ask_for_it_and_are_told(api, stack, new_key):
    client = openai.OpenAI(
        base_url=f"{stack.env['DARKROOM_URL']}/v1", api_key=new_key(), max_retries=0
    )
    extra = {"clip_skip": 1, "steps": 4, "tier": "quality", "seed": 7}

    image = client.images.generate(prompt=BODY["prompt"], extra_body=extra)

    assert image.clip_skip == 1
    assert image.data[0].pixels_sha256 == pixels_of(made(api, clip_skip=1))


def test_the_command_and_the_client_ask_for_it(stack, client):
    said = ["estimate", "a red circle", "--clip-skip", "1", "--json"]

    done = CliRunner().invoke(darkroom, ["--data-dir", str(stack.data_dir), *said])
    job = client.create_job("a red circle", tier="batch", steps=60, clip_skip=1)
    client.cancel(job.id)

    assert json.loads(done.stdout)["clip_skip"] == 1
    assert (job.clip_skip, client.estimate("a red circle", clip_skip=0).clip_skip) == (1, 0)


@pytest.mark.parametrize("url", ["/v1/jobs", "/v1/estimate"])
@pytest.mark.parametrize(("value", "why"), [(-1, "from 0 to 12"), (13, "from 0 to 12"), (1.5, "")])
def test_a_clip_skip_that_no_encoder_has_is_refused(api, url, value, why):
    answer = api.post(url, json=BODY | {"clip_skip": value})

    problem = assert_problem(answer, 422, REFUSED)
    assert problem["errors"][0]["pointer"] == "/clip_skip"
    assert why in problem["errors"][0]["detail"]


def test_a_family_that_does_not_take_it_refuses_it_by_name(gateway_with, new_key):
    changes = {"family": "flux", "samplers": ["flow_euler"], "default_sampler": "flow_euler"}
    fleet = a_fleet({f"models.pocket.{name}": value for name, value in changes.items()})
    answer = gateway_with(fleet).post(
        "/v1/jobs", json=BODY | {"clip_skip": 1}, headers=bearer(new_key())
    )

    problem = assert_problem(answer, 422, REFUSED)
    assert problem["errors"][0]["pointer"] == "/clip_skip"
    assert "cannot be used with model pocket" in problem["errors"][0]["detail"]


@pytest.mark.parametrize("url", ["/v1/jobs", "/v1/estimate"])
def test_more_than_the_checkpoint_has_is_refused_with_its_limit(api, url):
    problem = assert_problem(api.post(url, json=BODY | {"clip_skip": 2}), 422, REFUSED)

    assert problem["errors"][0]["pointer"] == "/clip_skip"
    assert problem["errors"][0]["accepted"] == {"min": 0, "max": 1}
