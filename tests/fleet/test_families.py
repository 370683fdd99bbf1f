"""Every family and kind of model from the request to the stored image.

One stack whose worker has a tiny checkpoint of each: through gateway, Celery, engine and object
store, by the API alone.
"""

import io
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import openai
import pytest
from click.testing import CliRunner
from PIL import Image

from cli.main import darkroom
from cli.sql import ask
from darkroom_client import Client, Job, ProblemError
from fleet.stack import Stack
from policy.params import PARAMS
from tests.buckets import an_object_store
from tests.builders import until
from tests.fleet.tiny_fleet import MODELS, fleet_of, tiny_weights
from tests.pictures import png

PROMPT = "a red circle on the blue background"
FIELDS = {"seed": 7, "steps": 3, "guidance": 2.0, "tier": "quality"}
FAR, FARTHER = "far-sdxl", "far-sd3"  # their weights are in an object store
EDIT_MODELS = ("kontext", "pix2pix")
KEEPING_MODELS = ("sd", "sdxl", "sd3", "flux-dev", "flux-schnell")  # they repaint by themselves


@pytest.fixture(scope="module")
def families() -> Iterator[Stack]:
    """The stack. Not below pytest's own folder: Postgres could not read it."""
    folder = Path(tempfile.mkdtemp(prefix="darkroom-families-"))
    file = folder / "fleet.toml"
    file.write_text(fleet_of(tiny_weights(), far={FAR: "sdxl"}))
    stack = Stack(folder / "data", fleet_file=file)
    with an_object_store(tiny_weights()) as store, pytest.MonkeyPatch.context() as environment:
        for name, value in store.items():
            environment.setenv(name, value)
        try:
            stack.up(wait_s=280)
            yield stack
        finally:
            stack.down()
            shutil.rmtree(folder, ignore_errors=True)


class Renders:
    """Makes jobs and waits for them. The plain job of a model is made once."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self._plain: dict[str, Job] = {}

    def plain(self, model: str) -> Job:
        if model not in self._plain:
            self._plain[model], *_ = self.made(model, {})
        return self._plain[model]

    def made(self, model: str, *each: Mapping[str, Any]) -> list[Job]:
        """New jobs that differ from the model's plain one by these fields, all of them done."""
        plain = FIELDS | {role: PICTURES[role] for role in MODELS[model].pictures}
        created = [
            self.client.create_job(**{"prompt": PROMPT, "model": model, **plain, **changes})
            for changes in each
        ]
        return [self.finished(job) for job in created]

    def made_far(self, model: str, **changes: Any) -> Job:
        """A job of a model whose weights are elsewhere, done."""
        fields = {"prompt": PROMPT, "model": model, **FIELDS, **changes}
        return self.finished(self.client.create_job(**fields))

    def finished(self, job: Job) -> Job:
        job = self.client.wait(job.id, timeout_s=120)
        assert job.state == "succeeded", (job.model, job.failure)
        return job

    def image(self, job: Job) -> Image.Image:
        return Image.open(io.BytesIO(self.client.image(job)))


@pytest.fixture(scope="module")
def renders(families) -> Iterator[Renders]:
    with Client(families.env["DARKROOM_URL"], families.env["DARKROOM_API_KEY"]) as client:
        yield Renders(client)


def a_picture(way: str = "down", side_px: int = 64) -> bytes:
    """A gradient down, or across."""
    gradient = Image.linear_gradient("L")
    turned = gradient if way == "down" else gradient.transpose(Image.Transpose.ROTATE_90)
    return png(turned.resize((side_px, side_px)).convert("RGB"))


def a_mask(part: float = 0.5, side_px: int = 64) -> bytes:
    """The right part of the image is painted anew."""
    pixels = np.zeros((side_px, side_px), np.uint8)
    pixels[:, round(side_px * (1 - part)) :] = 255
    return png(Image.fromarray(pixels))


PICTURES = {"init_image": a_picture(), "mask": a_mask(), "control_image": a_picture("across")}


def pixels_of(job: Job) -> str | None:
    return job.images[0].pixels_sha256


@pytest.mark.parametrize("model", list(MODELS))
def test_a_seed_gives_a_model_s_image_again_and_another_seed_another(renders, model):
    first = renders.plain(model)
    again, other = renders.made(model, {}, {"seed": 8})

    image = renders.image(first)
    assert (image.format, f"{image.width}x{image.height}") == ("PNG", first.size)
    assert first.size == MODELS[model].sizes[0]
    assert any(low < high for low, high in image.convert("RGB").getextrema())
    assert first.images[0].content_sha256 == again.images[0].content_sha256
    assert pixels_of(first) == pixels_of(again) != pixels_of(other)


@pytest.mark.parametrize("model", [name for name, model in MODELS.items() if model.layouts])
def test_an_adapter_says_the_same_in_every_layout_of_its_keys(renders, model):
    layouts = MODELS[model].layouts
    worn = [{"adapters": [{"name": layout}]} for layout in layouts]

    half, *adapted = renders.made(
        model, {"adapters": [{"name": layouts[0], "strength": 0.5}]}, *worn
    )

    assert dict(zip(layouts, map(pixels_of, adapted), strict=True)) == dict.fromkeys(
        layouts, pixels_of(adapted[0])
    )
    assert len({pixels_of(job) for job in (renders.plain(model), half, adapted[0])}) == 3


@pytest.mark.parametrize("model", KEEPING_MODELS)
def test_a_mask_keeps_the_rest_of_the_picture(renders, model):
    repainted = {"init_image": PICTURES["init_image"], "mask": PICTURES["mask"]}

    # Not another seed: what a VAE makes of a picture is drawn by it.
    one, other = renders.made(model, repainted, repainted | {"prompt": "a green square"})

    first, second = (np.asarray(renders.image(job), float) for job in (one, other))
    change = np.abs(first - second)
    # Kept to the bit until it is decoded; a decoder looks further than a pixel.
    assert change[:, :8].mean() < change[:, 32:].mean() / 3


@pytest.mark.parametrize("model", [name for name, model in MODELS.items() if model.pictures])
def test_a_model_goes_by_every_picture_that_it_takes(renders, model):
    other = {"init_image": a_picture("across"), "mask": a_mask(0.25), "control_image": a_picture()}

    changed = renders.made(model, *({role: other[role]} for role in MODELS[model].pictures))

    made = {pixels_of(job) for job in (renders.plain(model), *changed)}
    assert len(made) == 1 + len(changed)


@pytest.mark.parametrize(
    ("model", "fields", "member"),
    [
        ("sd-inpaint", {"init_image": None, "mask": None}, "init_image"),
        ("flux-fill", {"mask": None}, "mask"),
        ("controlnet", {"control_image": None}, "control_image"),
        ("kontext", {"init_image": a_picture(), "mask": a_mask()}, "mask"),
        ("kontext", {"strength": 0.5}, "strength"),
        ("sd", {"control_image": a_picture()}, "control_image"),
        ("sdxl", {"adapters": [{"name": "peft"}, {"name": "peft"}]}, "adapters"),
    ],
)
def test_what_a_model_cannot_render_is_refused_at_the_door(renders, model, fields, member):
    with pytest.raises(ProblemError) as refused:
        renders.made(model, fields)

    assert refused.value.status == 422
    assert member in str(refused.value)


def test_a_negative_prompt_acts_on_flux_where_its_true_guidance_is_on(renders):
    told = {"negative_prompt": "a blue star"}

    (guided,) = renders.made("flux-guided", told)
    (plain,) = renders.made("flux-dev", told)

    assert pixels_of(guided) != pixels_of(renders.plain("flux-guided"))
    assert pixels_of(plain) == pixels_of(renders.plain("flux-dev"))
    assert (len(guided.warnings), len(plain.warnings)) == (0, 1)


@pytest.mark.parametrize("model", EDIT_MODELS)
def test_an_edit_model_needs_no_strength(renders, model):
    without = renders.plain(model)
    (whole,) = renders.made(model, {"strength": 1})
    again = renders.finished(renders.client.replay(without.id))

    assert (without.strength, whole.strength, again.strength) == (None, 1.0, None)
    assert pixels_of(without) == pixels_of(whole) == pixels_of(again)


@pytest.mark.parametrize("model", EDIT_MODELS)
def test_openai_s_clients_edit_and_vary_pictures_with_an_edit_model(families, model):
    env = families.env
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


@pytest.mark.parametrize(
    ("model", "options", "fields"),
    [
        ("sd", ["--adapter", "kohya=0.5"], {"adapters": [{"name": "kohya", "strength": 0.5}]}),
        ("controlnet", ["--control", "picture.png"], {"control_image": a_picture()}),
    ],
)
def test_generate_makes_what_the_api_makes(
    families, renders, tmp_path, monkeypatch, model, options, fields
):
    for name in ("DARKROOM_URL", "DARKROOM_API_KEY", "DARKROOM_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    Path("picture.png").write_bytes(a_picture())
    plain = ["--seed", "7", "--steps", "3", "--guidance", "2", "--tier", "quality"]

    command = ["--data-dir", str(families.data_dir), "generate", PROMPT, "--model", model]
    done = CliRunner().invoke(darkroom, [*command, *plain, *options])

    assert done.exit_code == 0, done.output
    (job,) = renders.made(model, fields)
    assert Path("out.png").read_bytes() == renders.client.image(job)


# --- weights that are kept elsewhere ---


def test_a_model_from_s3_makes_what_it_makes_from_a_folder(renders):
    worn = {"adapters": [{"name": "peft"}]}

    far, far_adapted = renders.made_far(FAR), renders.made_far(FAR, **worn)

    [adapted] = renders.made("sdxl", worn)
    assert pixels_of(far) == pixels_of(renders.plain("sdxl"))
    assert pixels_of(far_adapted) == pixels_of(adapted)


def test_a_model_from_s3_joins_the_running_worker(families, renders, tmp_path):
    pids = {each.name: each.pid for each in families.status()}
    file = tmp_path / "fleet.toml"
    file.write_text(fleet_of(tiny_weights(), far={FAR: "sdxl", FARTHER: "sd3"}))
    told = ["--data-dir", str(families.data_dir), "fleet", "apply", str(file), "--note", "a test"]

    applied = CliRunner().invoke(darkroom, told)
    assert applied.exit_code == 0, applied.output

    def made() -> Job | None:
        with suppress(ProblemError):  # the gateway does not know it yet, or no worker serves it
            return renders.made_far(FARTHER)
        return None

    far = until(made, within_s=120, what="the worker")

    assert pixels_of(far) == pixels_of(renders.plain("sd3"))
    assert {each.name: each.pid for each in families.status()} == pids, "no process started anew"


# --- what a request says reaches the engine ---


class Pair(NamedTuple):
    """Two requests that differ in one member of the API, and in their pixels for that."""

    member: str
    value: Any
    model: str = "sd"
    both: Mapping[str, Any] = {}  # beside the plain fields


FROM_A_PICTURE = {"init_image": a_picture(), "strength": 1.0}
# Each field of the engine's ImageRequest that a request of the API decides. Those that it does not,
# with the reason, are in tests/test_params.py, which has no field of ImageRequest left out.
SEEN = {
    "prompt": Pair("prompt", "a green square"),
    "negative_prompt": Pair("negative_prompt", "a blue star"),
    "width_px": Pair("size", "96x64"),
    "height_px": Pair("size", "64x96"),
    "num_steps": Pair("steps", 2),
    "guidance": Pair("guidance", 4.0),
    "sampler": Pair("sampler", "dpmpp_2m"),
    "seed": Pair("seed", 8),
    "init_image": Pair("init_image", a_picture("across"), both={**FROM_A_PICTURE, "strength": 0.7}),
    "mask": Pair("mask", a_mask(), both=FROM_A_PICTURE),
    "strength": Pair("strength", 0.4, both=FROM_A_PICTURE),
    "control_image": Pair("control_image", a_picture(), model="controlnet"),
    "clip_skip": Pair("clip_skip", 1),
    "adapters": Pair("adapters", [{"name": "peft"}]),
}
# How an image shares forwards, not what it shows.
OF_THE_TIER = {"determinism", "bucket_rows"}


def test_every_field_that_a_request_decides_is_tried():
    assert set(SEEN) | OF_THE_TIER == {param.engine_field for param in PARAMS} - {None}


@pytest.mark.parametrize("field", list(SEEN))
def test_another_value_of_a_field_makes_another_image(renders, field):
    pair = SEEN[field]

    *apart, other = renders.made(
        pair.model, *filter(None, [pair.both]), {**pair.both, pair.member: pair.value}
    )

    one = apart[0] if apart else renders.plain(pair.model)
    assert pixels_of(one) != pixels_of(other)


def test_a_tier_decides_how_many_rows_a_forward_has(families, renders):
    pinned = renders.plain("sd")
    (shared,) = renders.made("sd", {"tier": "fast"})

    asked = "SELECT bucket_rows FROM attempts WHERE job_id = %s"
    made = [
        ask(families.env["MIGRATION_DATABASE_URL"], asked, [job.id]).rows[0][0]
        for job in (shared, pinned)
    ]
    assert made == [None, 4]
    assert (shared.determinism, pinned.determinism) == ("best_effort", "reproducible")
