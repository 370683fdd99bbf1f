"""What is reserved for one tenant is named to no other, at any door."""

import io
import json
import uuid
from types import SimpleNamespace

import pytest
from PIL import Image

from models import api_keys, tenants
from models.database import transaction
from policy.limits import DEFAULT_SCOPES
from tests.app.conftest import bearer
from tests.app.problem import assert_problem
from tests.builders import GONE, a_fleet

SECRETS = ("secret-model", "secret-version", "secret-tier", "secret-pool", "72x72")
PROMPT = {"prompt": "a red circle"}
SHAPE = {"slots": 8, "max_batch_rows": 8}


@pytest.fixture(scope="module")
def key_of(stack, stack_database):
    """A key of a new tenant, with its name."""

    def key_of(*scopes, **limits):
        name = f"app-{uuid.uuid4().hex[:8]}"
        with transaction(stack_database) as session:
            tenant = tenants.create(session, name=name, actor="tests")
            tenants.limit(session, tenant, changes=limits, actor="tests")
            own = {"tenant_id": tenant.id, "name": "all", "actor": "tests"}
            pepper = stack.env["API_KEY_PEPPER"]
            scopes = [*DEFAULT_SCOPES, *scopes]
            _, key = api_keys.issue(session, scopes=scopes, pepper=pepper, **own)
        return SimpleNamespace(tenant=name, headers=bearer(key))

    return key_of


@pytest.fixture(scope="module")
def owner(key_of):
    return key_of("versions")


@pytest.fixture(scope="module")
def http(gateway_with, owner):
    """A gateway with a model, a version, a tier and a pool that are the owner's."""
    plain = a_fleet()
    model = plain.models["large"].model_dump(mode="json", exclude_none=True)
    tier = plain.tiers["batch"].model_dump(mode="json", exclude_none=True)
    versions = [{"id": "1", "source": "a"}, {"id": "secret-version", "source": "b"}]
    reserved = {"models": ["secret-model", "pocket"], "tenants": [owner.tenant], "scalable": True}
    changes = {
        "models.secret-model": model | {"sizes": ["72x72"], "tiers": GONE},
        "models.secret-model.tiers": {"quality": {"bucket_rows": {"72x72": 4}}},
        "models.pocket.versions": versions,
        "models.pocket.tiers.secret-tier": {"version": "secret-version"},
        "tiers.secret-tier": tier | {"rank": 9},
        "pools.local.models": ["pocket@1"],
        "pools.local.tiers": ["fast", "quality"],
        "pools.local.scalable": True,
        "pools.big.tiers": ["fast", "quality"],
        "pools.secret-pool": SHAPE | reserved,
    }
    return gateway_with(a_fleet(changes))


def told(http, headers, *, version="pocket@2"):
    """The texts of all answers that name what may be asked for."""
    gets = ["/v1/models", "/v1/models/pocket", "/v1/models/no-such", "/v1/tiers", "/openapi.json"]
    refused = [{"model": "no-such"}, {"model": version}, {"tier": "no-such"}, {"sampler": "none"}]
    for url in gets:
        yield url, http.get(url, headers=headers).text
    for fields in refused:
        for url in ("/v1/jobs", "/v1/estimate", "/v1/images/generations"):
            answer = http.post(url, json=PROMPT | fields, headers=headers)
            assert answer.status_code in (400, 404, 422), answer.text
            yield f"{url} {fields}", answer.text


@pytest.mark.parametrize("scopes", [(), ("versions",)], ids=["plain", "versions"])
def test_no_door_names_to_another_tenant_what_is_reserved(http, key_of, scopes):
    headers = key_of(*scopes).headers

    for where, text in told(http, headers):
        for secret in SECRETS:
            assert secret not in text, where


def test_no_door_names_what_is_reserved_to_somebody_without_a_key(http):
    answer = http.get("/openapi.json")

    assert "public" in answer.headers["Cache-Control"]
    assert [secret for secret in SECRETS if secret in answer.text] == []


def test_the_owner_is_told_of_what_is_reserved_for_it(http, owner):
    models = http.get("/v1/models", headers=owner.headers).text
    spec = http.get("/openapi.json", headers=owner.headers)

    for secret in SECRETS:
        assert secret in models
    fields = json.loads(spec.text)["components"]["schemas"]["JobBody"]["properties"]
    assert "secret-model" in str(fields["model"])
    assert "pocket@secret-version" in str(fields["model"])
    assert "secret-tier" in str(fields["tier"])
    assert "private" in spec.headers["Cache-Control"]


def test_a_forbidden_tier_is_answered_with_those_that_are_offered(http, key_of):
    limited = key_of(allowed_tiers=["secret-tier", "quality"])

    answer = http.post("/v1/estimate", json=PROMPT | {"tier": "fast"}, headers=limited.headers)

    assert assert_problem(answer, 403, "forbidden")["accepted"] == {"tiers": ["quality"]}
    default = http.post("/v1/estimate", json=PROMPT, headers=limited.headers).json
    assert default["tier"] == "quality"


def test_openai_s_door_refuses_a_model_with_those_that_the_key_may_use(http, key_of):
    headers = key_of(allowed_models=["large"]).headers
    url = "/v1/images/generations"

    answer = http.post(url, json=PROMPT | {"model": "no-such"}, headers=headers)

    assert assert_problem(answer, 404, "model-not-found")["accepted"] == ["large"]


@pytest.mark.parametrize("model", [None, "large@1"], ids=["the default", "a version"])
def test_an_edit_without_a_size_gets_the_nearest_of_the_model_that_renders_it(
    a_house, key_of, model
):
    changes = {
        "models.large.sizes": ["512x512", "768x512"],
        "models.large.tiers.quality.bucket_rows": {"512x512": 4, "768x512": 4},
        "pools.POOL.models": ["pocket", "large"],
        "pools.POOL.scalable": True,
        "pools.big": GONE,
    }
    house = a_house(changes, images_wait_s=1)
    own = key_of("versions", allowed_models=["large"])
    picture = io.BytesIO()
    Image.new("RGB", (300, 200)).save(picture, "PNG")
    picture.seek(0)
    form = PROMPT | {"image": (picture, "a.png")} | ({"model": model} if model else {})

    answer = house.http.post("/v1/images/edits", data=form, headers=own.headers)

    job = house.http.get(f"/v1/jobs/{answer.json['job_id']}", headers=own.headers).json
    assert (job["model"], job["size"]) == ("large", "768x512")
