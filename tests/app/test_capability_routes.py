"""What workers say of their checkpoints: shown by /v1/models, and held by every door."""

import uuid

import pytest

from models import capabilities
from models.database import transaction
from tests.abilities import NEEDED, PLAIN
from tests.app.conftest import bearer
from tests.app.problem import assert_problem
from tests.builders import a_fleet

REFUSED = "invalid-image-request"


@pytest.fixture(scope="module")
def edit_model(stack_database) -> str:
    """The name of a model whose worker said that it needs a picture and a mask."""
    name = f"edit-{uuid.uuid4().hex[:8]}"
    with transaction(stack_database) as session:
        capabilities.publish(session, {(name, "1"): PLAIN | NEEDED}, worker="cpu0@tests")
    return name


@pytest.fixture
def editing(gateway_with, new_key, edit_model):
    """Post to a gateway that offers that model."""
    model = a_fleet().models["large"].model_dump(mode="json", exclude_none=True)
    changes = {f"models.{edit_model}": model | {"samplers": ["ddim"], "default_sampler": "ddim"}}
    fleet = a_fleet(changes | {"pools.big.models": ["large", edit_model]})
    headers = bearer(new_key())

    def post(url, **body):
        body = {"prompt": "a red circle", "model": edit_model} | body
        return gateway_with(fleet).post(url, json=body, headers=headers)

    return post


def test_a_model_shows_what_its_worker_says_of_each_version(api):
    model = api.get("/v1/models/pocket").json()

    [version] = model["versions"]
    able = version["capabilities"]
    assert version["loaded"] is True
    assert able["pictures"] == {
        "init_image": "optional",
        "mask": "optional",
        "control_image": "none",
    }
    assert (able["negative_prompt"], able["guidance"], able["takes_strength"]) == (
        "guided",
        "used",
        True,
    )
    assert set(able["samplers"]) == set(model["samplers"])
    assert able["samplers"]["ddim"] == {"max_steps": 1000, "takes_picture": True}
    assert (able["sizes"], able["prompt_tokens"]) == (model["sizes"], {"text_encoder": 22})
    assert (able["adapters"], model["adapters"]) == ({}, [])


def test_a_version_that_no_worker_has_loaded_yet_shows_no_capabilities(gateway_with, new_key):
    model = gateway_with(a_fleet()).get("/v1/models/large", headers=bearer(new_key())).json

    [version] = model["versions"]
    assert (version["capabilities"], version["loaded"]) == (None, False)


@pytest.mark.parametrize("url", ["/v1/jobs", "/v1/estimate"])
def test_a_picture_that_is_needed_and_missing_is_refused_before_it_waits(editing, url):
    problem = assert_problem(editing(url), 422, REFUSED)

    [error] = problem["errors"]
    assert (error["pointer"], error["accepted"]) == ("/init_image", ["init_image", "mask"])


def test_openai_s_interface_refuses_it_too(editing):
    answer = editing("/v1/images/generations")

    assert answer.status_code == 400
    assert "init_image" in answer.json["error"]["message"]
