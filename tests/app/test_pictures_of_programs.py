"""What programs for OpenAI's interface send.

Forms as browsers and libraries make them, JSON, pictures with holes, masks of all kinds.
"""

import base64

import pytest
from PIL import Image

from tests.app.problem import assert_problem
from tests.pictures import a_picture, png

FIELDS = {"prompt": "a red circle", "steps": "2", "tier": "fast"}
EDIT = "/v1/images/edits"


def a_mask(mode="L", *, alpha=255, white=True) -> bytes:
    mask = Image.new("L", (64, 64), 0)
    if white:
        mask.paste(255, (0, 0, 32, 64))
    picture = mask.convert(mode)
    if mode == "RGBA":
        picture.putalpha(alpha)
    return png(picture)


def part(name: str, content: bytes = b"", filename: str = "a.png"):
    return (name, (filename, content, "image/png"))


def form(*files, fields=FIELDS) -> dict:
    return {"files": [part("image", png(a_picture(64, 64))), *files], "data": fields}


def data_url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def job_of(api, answer) -> dict:
    assert answer.status_code == 200, answer.json()
    return api.get(f"/v1/jobs/{answer.json()['job_id']}").json()


def refusal(answer, param: str) -> str:
    assert answer.status_code == 400, answer.json()
    assert answer.json()["error"]["param"] == param
    return answer.json()["error"]["message"]


@pytest.mark.parametrize("name", ["mask", "mask[]"])
def test_a_mask_may_be_called_as_libraries_call_lists(api, name):
    assert job_of(api, api.post(EDIT, **form(part(name, a_mask()))))["mask"]


@pytest.mark.parametrize("names", [["mask", "mask"], ["mask", "mask[]"]])
def test_a_second_mask_is_refused_and_not_passed_over(api, names):
    answer = api.post(EDIT, **form(*(part(name, a_mask()) for name in names)))

    assert "one mask at a time; the request has 2" in refusal(answer, "mask")


@pytest.mark.parametrize("name", ["prompt", "n", "seed", "size"])
def test_a_field_that_is_there_twice_is_refused_and_not_passed_over(api, name):
    files = [
        part("image", png()),
        *((key, (None, value)) for key, value in FIELDS.items() if key != name),
    ]

    answer = api.post(EDIT, files=[*files, (name, (None, "1")), (name, (None, "2"))])

    assert "is given 2 times" in refusal(answer, name)


@pytest.mark.parametrize("name", ["mask", "image[]"])
def test_a_file_input_that_nobody_filled_in_is_no_file(api, name):
    fields = "".join(
        f'--x\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'
        for key, value in FIELDS.items()
    )
    picture = (
        b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
        + png(a_picture(64, 64))
        + b"\r\n"
    )
    empty = (
        f'--x\r\nContent-Disposition: form-data; name="{name}"; filename=""\r\n\r\n\r\n--x--\r\n'
    )

    content = fields.encode() + picture + empty.encode()
    answer = api.post(
        EDIT, content=content, headers={"Content-Type": "multipart/form-data; boundary=x"}
    )

    assert job_of(api, answer)["mask"] is None


def test_a_file_that_is_empty_is_an_empty_picture(api):
    assert "is empty" in refusal(api.post(EDIT, **form(part("mask", b"", "mask.png"))), "mask")


@pytest.mark.parametrize("name", ["mask", "image"])
def test_a_picture_as_text_of_a_form_is_told_to_be_a_file(api, name):
    message = refusal(api.post(EDIT, **form(fields={**FIELDS, name: data_url(a_mask())})), name)

    assert "must be a file of the form" in message
    assert job_of(api, api.post(EDIT, **form(fields={**FIELDS, name: ""})))["state"] == "succeeded"


def test_numbers_of_forms_and_of_json_are_whole_if_they_are(api):
    job = job_of(
        api, api.post(EDIT, **form(fields={**FIELDS, "n": "1.0", "seed": "42.0", "steps": "2e0"}))
    )
    other = job_of(
        api,
        api.post(
            "/v1/images/generations",
            json={"prompt": "a dot", "n": 1.0, "seed": -1, "steps": 2.0, "tier": "fast"},
        ),
    )

    assert (job["n"], job["seed"], job["steps"]) == (1, 42, 2)
    assert other["seed"] >= 0
    assert "a whole number" in refusal(
        api.post("/v1/images/generations", json={"prompt": "a dot", "n": True}), "n"
    )
    assert "a whole number" in refusal(
        api.post("/v1/images/generations", json={"prompt": "a dot", "n": 1.5}), "n"
    )


def test_the_user_s_name_is_kept_in_any_script(api):
    body = {
        "prompt": "a dot",
        "steps": 2,
        "tier": "fast",
        "user": "\u6771\u4eac\u3000\u592a\u90ce \U0001f468\u200d\U0001f469\u200d\U0001f467",
    }

    assert job_of(api, api.post("/v1/images/generations", json=body))["metadata"] == {
        "user": body["user"]
    }


def test_the_user_s_name_does_not_replace_metadata_of_the_client_s_own(api):
    body = {
        "prompt": "a dot",
        "steps": 1,
        "tier": "fast",
        "user": "a",
        "metadata": {"user": "b", "order": "7"},
    }

    answer = api.post("/v1/images/generations", json=body)

    assert job_of(api, answer)["metadata"] == {"user": "b", "order": "7"}
    assert answer.json()["safety_identifier"] == "a"


@pytest.mark.parametrize(
    "pictures",
    [
        {"images": [{"image_url": data_url(png(a_picture(64, 64)))}]},
        {
            "images": [{"image_url": data_url(png(a_picture(64, 64)))}],
            "mask": {"image_url": data_url(a_mask())},
        },
        {"image": data_url(png(a_picture(64, 64))), "mask": data_url(a_mask())},
        {"image": [data_url(png(a_picture(64, 64)))]},
    ],
)
def test_an_edit_may_be_json_with_data_urls(api, pictures):
    answer = api.post(EDIT, json={"prompt": "a red circle", "steps": 2, "tier": "fast", **pictures})

    job = job_of(api, answer)
    assert job["init_image"]
    assert bool(job["mask"]) == ("mask" in pictures)


def test_an_edit_may_name_files_that_are_there(api, stranger):
    file, mask = (
        api.post("/v1/files", files={"file": ("a", content)}).json()["id"]
        for content in (png(a_picture(64, 64)), a_mask())
    )
    body = {
        "prompt": "a red circle",
        "steps": 2,
        "tier": "fast",
        "images": [{"file_id": file}],
        "mask": {"file_id": mask},
    }

    job = job_of(api, api.post(EDIT, json=body))

    assert (job["init_image"], job["mask"]) == (file, mask)
    assert "names a file that your tenant does not have" in refusal(
        stranger.post(EDIT, json=body), "image"
    )


@pytest.mark.parametrize(
    ("pictures", "param", "message"),
    [
        ({}, "image", "is required"),
        ({"images": []}, "image", "is required"),
        ({"images": [{"image_url": "data:,x"}] * 2}, "image", "one picture at a time"),
        ({"images": [{"url": "x"}]}, "image", "must be text"),
        ({"images": [7]}, "image", "must be text"),
        ({"images": ["no-id"]}, "image", "neither the id of a file nor a data URL"),
        ({"images": [data_url(b"<svg/>")]}, "image", "is not a PNG, JPEG or WebP file"),
        ({"images": [data_url(png())], "mask": 7}, "mask", "must be text"),
    ],
)
def test_json_without_one_picture_is_refused_by_name(api, pictures, param, message):
    assert message in refusal(api.post(EDIT, json={"prompt": "x", **pictures}), param)


def test_a_variation_may_be_json_too(api):
    answer = api.post(
        "/v1/images/variations",
        json={"image": data_url(png(a_picture(64, 64))), "steps": 4, "tier": "fast"},
    )

    assert job_of(api, answer)["strength"] == 0.6


def with_hole(alpha=0) -> bytes:
    picture = a_picture(64, 64).convert("RGBA")
    picture.paste((0, 0, 0, alpha), (0, 0, 32, 64))
    return png(picture)


def test_a_hole_in_the_picture_is_the_mask(api):
    answer = api.post(EDIT, files=[part("image", with_hole())], data=FIELDS)

    job = job_of(api, answer)
    assert job["mask"] == job["init_image"]
    assert job["strength"] == 1.0


def test_a_mask_of_its_own_wins_over_a_hole_and_a_faint_part_is_none(api):
    own = job_of(
        api, api.post(EDIT, files=[part("image", with_hole()), part("mask", a_mask())], data=FIELDS)
    )
    faint = job_of(api, api.post(EDIT, files=[part("image", with_hole(alpha=200))], data=FIELDS))

    assert own["mask"] not in (None, own["init_image"])
    assert faint["mask"] is None


SAYS_NOTHING = [
    a_mask(white=False),
    a_mask("RGBA", alpha=254, white=False),
    png(Image.new("L", (64, 64), 100)),
]


@pytest.mark.parametrize("mask", SAYS_NOTHING)
def test_a_mask_that_selects_nothing_is_refused_before_anything_is_billed(api, mask, count_jobs):
    before = count_jobs()
    file = api.post("/v1/files", files={"file": ("m", mask)}).json()["id"]
    start = data_url(png(a_picture(64, 64)))

    edit = api.post(EDIT, **form(part("mask", mask)))
    native = [
        api.post("/v1/jobs", json={"prompt": "x", "init_image": start, "mask": said})
        for said in (file, data_url(mask))
    ]
    batch = api.post(
        "/v1/jobs:batch", json={"jobs": [{"prompt": "x", "init_image": start, "mask": file}]}
    ).json()

    assert "selects nothing" in refusal(edit, "mask")
    for answer in native:
        [error] = assert_problem(answer, 422, "invalid-image-request")["errors"]
        assert (error["pointer"], error["detail"][:16]) == ("/mask", "selects nothing:")
    assert batch["refused"] == 1
    assert count_jobs() == before


def test_a_mask_of_black_and_white_means_the_same_with_an_alpha_that_says_nothing(api):
    made = [
        job_of(api, api.post(EDIT, **form(part("mask", mask), fields={**FIELDS, "seed": "5"})))
        for mask in (a_mask(), a_mask("RGBA", alpha=254), a_mask("RGBA", alpha=100))
    ]

    assert len({job["images"][0]["pixels_sha256"] for job in made}) == 1


def test_jobs_with_masks_are_accepted_while_the_store_is_away(gateway_with, api, elsewhere):
    contents = png(a_picture(64, 64)), SAYS_NOTHING[0]
    file, mask = (
        api.post("/v1/files", files={"file": ("a", content)}).json()["id"] for content in contents
    )
    client = gateway_with(**elsewhere("object_store"))

    answer = client.post(
        "/v1/jobs",
        json={"prompt": "x", "tier": "batch", "init_image": file, "mask": mask},
        headers={"Authorization": api.headers["Authorization"]},
    )

    assert answer.status_code == 202
    api.post(answer.json["urls"]["cancel"])


def test_a_try_that_comes_again_is_not_decoded_again(api):
    picture = png(a_picture(64, 64))
    first = job_of(api, api.post(EDIT, files=[part("image", picture)], data=FIELDS))
    api.delete(f"/v1/files/{first['init_image']}")

    again = api.post(
        EDIT, files=[part("image", picture)], data=FIELDS, headers={"X-Stainless-Retry-Count": "1"}
    )

    assert job_of(api, again)["id"] == first["id"]
    assert api.get(f"/v1/files/{first['init_image']}").status_code == 404
