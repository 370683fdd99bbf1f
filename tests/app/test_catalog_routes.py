"""/v1/models and /v1/tiers: what can be asked for, as fleet.toml has it."""

import pytest

from policy.fleet import parse_fleet
from settings import REPO
from tests.app.conftest import bearer
from tests.app.problem import assert_problem
from tests.builders import a_fleet

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
    model = api.get("/v1/models").json()["data"][0]

    expected = FLEET.models["pocket"]
    assert (model["id"], tuple(model["sizes"]), tuple(model["samplers"])) == (
        "pocket",
        expected.sizes,
        expected.samplers,
    )
    assert (model["max_guidance"], model["max_prompt_chars"], model["licence"]) == (
        15.0,
        2000,
        "Apache-2.0",
    )
    assert model["tiers"]["fast"] == {
        "default_steps": 4,
        "default_guidance": 1.5,
        "default_sampler": "ddim",
        "version": None,
        "adapters": [],
    }
    [version] = model["versions"]
    assert (version["id"], version["precision"], version["licence"]) == ("1", "fp32", "Apache-2.0")
    assert version["quantize"] is None
    assert model["output_formats"] == ["png", "webp", "jpeg"]
    assert model == api.get("/v1/models/pocket").json()


def test_nothing_of_where_the_weights_lie_is_told(api):
    assert "source" not in api.get("/v1/models/pocket").text


@pytest.mark.parametrize("guidance", [0.0, 7.5])
def test_a_model_s_defaults_are_what_a_job_gets_that_says_nothing(gateway_with, new_key, guidance):
    gateway = gateway_with(a_fleet({"models.pocket.tiers.fast.default_guidance": guidance}))
    headers = bearer(new_key())

    tiers = gateway.get("/v1/models/pocket", headers=headers).json["tiers"]

    assert tiers["fast"]["default_guidance"] == guidance
    for tier, defaults in tiers.items():
        job_body = {"prompt": "a red circle", "model": "pocket", "tier": tier}
        job = gateway.post("/v1/estimate", json=job_body, headers=headers).json
        assert defaults == {
            "default_steps": job["steps"],
            "default_guidance": job["guidance"],
            "default_sampler": job["sampler"],
            "version": None,
            "adapters": job["adapters"],
        }


def test_an_unknown_model_is_not_found_and_the_known_ones_are_told(api):
    assert assert_problem(api.get("/v1/models/dall-e-9"), 404, "model-not-found")[
        "accepted"
    ] == list(FLEET.model_ids)


def test_aliases_are_listed_after_the_models_and_found_by_their_names(api):
    listed = {model["id"]: model for model in api.get("/v1/models").json()["data"]}

    assert list(listed) == ["pocket", *FLEET.models["pocket"].aliases]
    assert "alias_of" not in listed["pocket"]
    assert listed["pocket"]["aliases"] == list(FLEET.models["pocket"].aliases)
    for alias in FLEET.models["pocket"].aliases:
        assert (
            listed[alias]
            == listed["pocket"] | {"id": alias, "alias_of": "pocket"}
            == api.get(f"/v1/models/{alias}").json()
        )


def test_an_alias_with_a_slash_is_found_too(gateway_with, new_key):
    fleet = a_fleet(
        {"models.large.aliases": ["stabilityai/stable-diffusion-3.5-large", "flux:dev"]}
    )

    for alias in fleet.models["large"].aliases:
        answer = gateway_with(fleet).get(f"/v1/models/{alias}", headers=bearer(new_key()))
        assert (answer.status_code, answer.json["id"], answer.json["alias_of"]) == (
            200,
            alias,
            "large",
        )


def test_tiers_come_in_the_order_in_which_they_are_served(api):
    answer = api.get("/v1/tiers").json()

    assert answer["object"] == "list"
    assert [tier["id"] for tier in answer["data"]] == list(FLEET.tiers_by_rank)
    for tier in answer["data"]:
        own = FLEET.tiers[tier["id"]]
        shown = {
            key: tier[key]
            for key in (
                "max_steps",
                "default_steps",
                "max_images",
                "max_megapixels",
                "determinism",
                "price_weight",
            )
        }
        assert shown == {key: getattr(own, key) for key in shown}
