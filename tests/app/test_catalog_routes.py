"""/v1/models and /v1/tiers: what can be asked for, as fleet.toml has it."""

from policy.fleet import parse_fleet
from settings import REPO
from tests.app.problem import assert_problem

FLEET = parse_fleet((REPO / "fleet.toml").read_text())


def test_models_have_openai_s_list_shape(api):
    answer = api.get("/v1/models").json()

    assert answer["object"] == "list"
    for model in answer["data"]:
        assert model["object"] == "model"
        assert isinstance(model["id"], str)
        assert isinstance(model["created"], int)
        assert isinstance(model["owned_by"], str)


def test_a_model_tells_what_it_accepts(api):
    [model] = api.get("/v1/models").json()["data"]

    expected = FLEET.models["pocket"]
    assert (model["id"], tuple(model["sizes"]), tuple(model["samplers"])) == ("pocket", expected.sizes, expected.samplers)
    assert (model["max_guidance"], model["max_prompt_chars"], model["licence"]) == (15.0, 2000, "Apache-2.0")
    assert model["tiers"]["fast"] == {"default_steps": 4, "default_guidance": 1.5}
    assert model["output_formats"] == ["png", "webp", "jpeg"]
    assert model == api.get("/v1/models/pocket").json()


def test_nothing_of_where_the_weights_lie_is_told(api):
    assert "source" not in api.get("/v1/models/pocket").text


def test_an_unknown_model_is_not_found_and_the_known_ones_are_told(api):
    assert assert_problem(api.get("/v1/models/dall-e-9"), 404, "model-not-found")["accepted"] == ["pocket"]


def test_tiers_come_in_the_order_in_which_they_are_served(api):
    answer = api.get("/v1/tiers").json()

    assert answer["object"] == "list"
    assert [tier["id"] for tier in answer["data"]] == list(FLEET.tiers_by_rank)
    for tier in answer["data"]:
        own = FLEET.tiers[tier["id"]]
        shown = {key: tier[key] for key in ("max_steps", "default_steps", "max_images", "max_megapixels", "determinism", "price_weight")}
        assert shown == {key: getattr(own, key) for key in shown}
