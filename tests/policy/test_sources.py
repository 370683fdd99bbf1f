"""Where weights are kept, as fleet.toml says it."""

import pytest

from engine.folders import READ_SUFFIXES
from policy.fleet import FleetInvalid
from policy.sources import (
    FETCHED_SUFFIXES,
    HubSource,
    S3Source,
    is_fetched,
    remote_source,
)
from tests.builders import a_fleet

COMMIT = "0123456789abcdef0123456789abcdef01234567"
DIGEST = "0" * 64


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("sdxl", None),
        ("/srv/checkpoints/sdxl", None),
        ("s3://weights/sdxl/v2/", S3Source("weights", "sdxl/v2")),
        ("s3://weights", S3Source("weights", "")),
        (f"hf:org/repo@{COMMIT}", HubSource("org/repo", COMMIT, "")),
        (f"hf:org/repo@{COMMIT}/a/b", HubSource("org/repo", COMMIT, "a/b")),
    ],
)
def test_source_is_read(text, source):
    assert remote_source(text) == source


@pytest.mark.parametrize(
    "text",
    [
        "s3://",
        "s3://Weights/sdxl",
        "s3://weights/../secrets",
        "hf:org/repo",
        "hf:org/repo@main",
        "hf:org/repo@0123456",
        f"hf:repo@{COMMIT}",
        f"hf:org/repo@{COMMIT}/../x",
        "https://example.org/sdxl",
        "gs://weights/sdxl",
    ],
)
def test_source_of_another_form_is_refused_with_what_is_accepted(text):
    with pytest.raises(ValueError, match=r'accepted: a folder, "s3://BUCKET/PREFIX", or "hf:'):
        remote_source(text)


@pytest.mark.parametrize(
    ("name", "may"),
    [
        ("unet/model.safetensors", True),
        ("model_index.json", True),
        ("unet/model.bin", False),
        ("unet/model.ckpt", False),
        ("pipeline.py", False),
        ("../fleet.json", False),
        ("/etc/passwd.json", False),
        ("a//b.json", False),
    ],
)
def test_pickles_code_and_ways_out_are_never_fetched(name, may):
    assert is_fetched(name) is may


def test_what_is_fetched_is_what_the_engine_reads():
    assert FETCHED_SUFFIXES == READ_SUFFIXES


VERSION = "models.pocket.versions.0"
ADAPTERS = "models.pocket.adapters"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {f"{VERSION}.source": "s3://weights/x", f"{VERSION}.sha256": {}},
            f"{VERSION}.sha256: is missing: of s3://weights/x only files with a digest",
        ),
        (
            {f"{VERSION}.source": "s3://weights/x", f"{VERSION}.sha256": {"a/m.bin": DIGEST}},
            f'{VERSION}.sha256."a/m.bin": is never fetched',
        ),
        (
            {ADAPTERS: {"ink": {"source": "s3://weights/ink.bin", "sha256": DIGEST}}},
            f"{ADAPTERS}.ink.source: names no .safetensors file",
        ),
        ({f"{VERSION}.source": "hf:a/b@main"}, f"{VERSION}.source: 'hf:a/b@main' is no place"),
    ],
)
def test_fleet_file_whose_weights_could_not_be_fetched_is_refused(changes, told):
    with pytest.raises(FleetInvalid) as refused:
        a_fleet(changes)

    assert told in str(refused.value)
