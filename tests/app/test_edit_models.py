"""Edit models on a stack of their own: pipelines that take a picture and know of no strength.

Tiny ones with random weights, from the request through gateway, Celery, worker and object store to
the pixels.
"""

import io
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from PIL import Image

from fleet.stack import Stack
from settings import REPO
from tests.builders import GONE, fleet_text
from tests.pictures import png

sys.path.append(str(REPO / "tests" / "engine"))
from tiny_pipelines import save_tiny_pipeline

pytestmark = pytest.mark.slow

SIZE = "32x32"
KONTEXT = {"max_sequence_length": 40, "max_area": 1024, "_auto_resize": False}
EDIT_MODELS = {"kontext": ("flux-kontext", KONTEXT), "pix2pix": ("instruct-pix2pix", {})}
BODY = {"prompt": "a blue star", "steps": 3, "seed": 7}
WAIT = {"Prefer": "wait=60"}


@pytest.fixture(scope="module")
def edit_stack() -> Iterator[Stack]:
    """A stack with two edit models. Not below pytest's own folder: Postgres could not read it."""
    folder = Path(tempfile.mkdtemp(prefix="darkroom-edit-"))
    file = folder / "fleet.toml"
    file.write_text(a_fleet_of_edit_models(folder))
    stack = Stack(folder / "data", fleet_file=file)
    try:
        stack.up(wait_s=280)
        yield stack
    finally:
        stack.down()
        shutil.rmtree(folder, ignore_errors=True)


def a_fleet_of_edit_models(folder: Path) -> str:
    models = {}
    for name, (pipeline, options) in EDIT_MODELS.items():
        save_tiny_pipeline(pipeline, folder / name)
        models[f"models.{name}"] = {
            "title": name,
            "family": "pipeline",
            "options": options,
            "licence": "none",
            "precision": "fp32",
            "sizes": [SIZE],
            "samplers": ["default"],
            "default_sampler": "default",
            "default_guidance": 2.0,
            "max_guidance": 10.0,
            "created_at": "2026-11-21T00:00:00Z",
            "tiers": {"quality": {"bucket_rows": {SIZE: 4}}},
            "versions": [{"id": "1", "source": str(folder / name)}],
        }
    one_pool = {"models": list(EDIT_MODELS), "slots": 8, "max_batch_rows": 8, "warm_floor": 1}
    gone = {"models.pocket": GONE, "models.large": GONE, "pools.big": GONE}
    return fleet_text({**gone, **models, "pools.local": one_pool})


@pytest.fixture(scope="module")
def edit_api(edit_stack) -> Iterator[httpx.Client]:
    env = edit_stack.env
    headers = {"Authorization": f"Bearer {env['DARKROOM_API_KEY']}"}
    url = env["DARKROOM_URL"]
    with httpx.Client(base_url=url, headers=headers, timeout=90, trust_env=False) as client:
        yield client


def a_picture() -> bytes:
    picture = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
    return png(picture)


def image_of(api: httpx.Client, job: dict) -> Image.Image:
    location = api.get(job["images"][0]["url"]).headers["Location"]
    return Image.open(io.BytesIO(httpx.get(location, trust_env=False).content))


@pytest.mark.parametrize("model", list(EDIT_MODELS))
def test_an_edit_model_makes_an_image_of_a_picture_without_a_strength(edit_api, model):
    file = edit_api.post(
        "/v1/files", content=a_picture(), headers={"Content-Type": "image/png"}
    ).json()
    body = BODY | {"model": model, "init_image": file["id"]}

    job = edit_api.post("/v1/jobs", json=body, headers=WAIT).json()
    whole = edit_api.post("/v1/jobs", json=body | {"strength": 1}, headers=WAIT).json()
    again = edit_api.post(f"/v1/jobs/{job['id']}/replay", headers=WAIT).json()

    assert job["state"] == "succeeded", job
    assert (job["strength"], whole["strength"], again["strength"]) == (None, 1.0, None)
    pixels = {one["images"][0]["pixels_sha256"] for one in (job, whole, again)}
    assert len(pixels) == 1
    assert image_of(edit_api, job).size == (32, 32)


@pytest.mark.parametrize("model", list(EDIT_MODELS))
def test_openai_s_clients_edit_and_vary_pictures(edit_stack, model):
    env = edit_stack.env
    client = openai.OpenAI(
        base_url=f"{env['DARKROOM_URL']}/v1", api_key=env["DARKROOM_API_KEY"], max_retries=0
    )
    extra = {"steps": 3, "seed": 7}

    edited = client.images.edit(
        model=model, image=("a.png", a_picture()), prompt="a blue star", extra_body=extra
    )
    varied = client.images.create_variation(
        model=model, image=("a.png", a_picture()), extra_body=extra
    )

    assert (edited.strength, varied.strength) == (None, None)
    assert edited.data[0].b64_json
    assert varied.data[0].url or varied.data[0].b64_json
