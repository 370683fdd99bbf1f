"""Jobs that start from a picture, on the real stack.

Strength, masks, replays, and honest numbers.
"""

import io

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.pictures import decoded, png

pytestmark = pytest.mark.slow

JOB_BODY = {
    "prompt": "a large red circle in the center on a blue background",
    "tier": "quality",
    "steps": 20,
    "seed": 11,
}


@pytest.fixture(scope="module")
def start(api) -> dict:
    """A picture of what the pocket model knows: the job that made it, its file, its pixels."""
    job_body = JOB_BODY | {
        "prompt": "a large green square in the center on a yellow background",
        "seed": 5,
    }
    job = done(api.post("/v1/jobs", json=job_body, headers={"Prefer": "wait=60"}))
    content = download(api, job)
    return {
        "file": api.post(
            "/v1/files", content=content, headers={"Content-Type": "image/png"}
        ).json(),
        "pixels": pixels(content),
    }


def done(answer: httpx.Response) -> dict:
    job = answer.json()
    assert job.get("state") == "succeeded", job
    return job


def download(api, job, index=0) -> bytes:
    return httpx.get(
        api.get(job["images"][index]["url"]).headers["Location"], trust_env=False
    ).content


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(decoded(content).convert("RGB")).astype(int)


def render(api, **fields) -> tuple[dict, np.ndarray]:
    job = done(api.post("/v1/jobs", json=JOB_BODY | fields, headers={"Prefer": "wait=60"}))
    return job, pixels(download(api, job))


def distance(one, other, where=...) -> float:
    return float(np.abs(one - other)[where].mean())


def a_mask(*, mode: str = "L") -> bytes:
    """Its right half is to be repainted."""
    mask = Image.new("L", (128, 128), 0)
    mask.paste(255, (64, 0, 128, 128))
    if mode == "L":
        return png(mask)
    picture = Image.new("RGBA", (128, 128), "white")
    picture.putalpha(mask.point(lambda value: 255 - value))
    return png(picture)


def test_the_lower_the_strength_the_nearer_the_image_stays(api, start):
    at = {
        strength: render(api, init_image=start["file"]["id"], strength=strength)
        for strength in (0.1, 0.5, 0.95)
    }

    distances = [distance(image, start["pixels"]) for _, image in at.values()]
    assert distances == sorted(distances)
    assert distances[0] < 10
    assert distances[0] < distances[2] / 3


def test_only_what_the_mask_says_is_repainted(api, start):
    masks = {
        mode: api.post("/v1/files", files={"file": ("mask", a_mask(mode=mode))}).json()
        for mode in ("L", "RGBA")
    }

    job, image = render(api, init_image=start["file"]["id"], mask=masks["L"]["id"])
    _, same = render(api, init_image=start["file"]["id"], mask=masks["RGBA"]["id"])

    kept, repainted = np.s_[:, :48], np.s_[:, 72:]  # the VAE blurs the border
    assert job["strength"] == 1.0
    assert distance(image, start["pixels"], kept) < 6
    assert distance(image, start["pixels"], repainted) > 20
    assert (image == same).all(), "transparent and white mean the same"


def test_the_same_job_again_gives_the_same_pixels(api, start):
    job_body = {"init_image": start["file"]["id"], "strength": 0.6, "n": 2}

    first, _ = render(api, **job_body)
    second, _ = render(api, **job_body)

    assert [image["pixels_sha256"] for image in first["images"]] == [
        image["pixels_sha256"] for image in second["images"]
    ]
    assert len({image["pixels_sha256"] for image in first["images"]}) == 2


def test_skipped_steps_are_not_counted(api, start):
    job, _ = render(api, init_image=start["file"]["id"], strength=0.25, n=2)
    whole, _ = render(api, steps=4)

    assert job["progress"] == {"step": 10, "num_steps": 10, "images_done": 2}
    assert job["megapixel_steps"] == round(128 * 128 * 10 / 1e6, 6)
    assert (
        api.post(
            "/v1/estimate",
            json=JOB_BODY | {"init_image": start["file"]["id"], "strength": 0.25, "n": 2},
        ).json()["megapixel_steps"]
        == (job["megapixel_steps"])
    )
    assert whole["progress"] == {"step": 4, "num_steps": 4, "images_done": 1}


def test_a_picture_of_any_size_is_cut_to_the_image_s(api):
    wide = Image.new("RGB", (400, 100), "white")
    wide.paste((255, 0, 0), (150, 0, 250, 100))

    _, image = render(api, init_image=_data_url(wide), strength=0.05)

    assert np.abs(image - (255, 0, 0)).mean() < 40


def _data_url(picture: Image.Image) -> str:
    import base64

    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", lossless=True)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
