"""Every place that says the version says the same one, which policy/version.py has."""

import re
import tomllib

import pytest

import darkroom_client
from darkroom_client.address import USER_AGENT
from edges import outbound
from policy.version import VERSION
from tests.documents import text_of

NUMBER = r"\d+\.\d+\.\d+"
# Of a release, and of what comes before one.
SHAPE = re.compile(rf"(?P<release>{NUMBER})(?P<later>\.dev0)?")
IMAGES = {"deploy/api.Dockerfile": "darkroom-api", "deploy/worker.Dockerfile": "darkroom-worker"}
HEADING = rf"^## \[({NUMBER})\] - \d{{4}}-\d{{2}}-\d{{2}}$"


def found(name: str, pattern: str) -> list[str]:
    """What the pattern's group matches in a file."""
    return re.findall(pattern, text_of(name), re.MULTILINE)


def sorted_by(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def labels_of(dockerfile: str) -> dict[str, str]:
    return dict(found(dockerfile, r'org\.opencontainers\.image\.(\w+)="([^"]*)"'))


def test_the_version_is_a_release_or_on_the_way_to_one():
    assert SHAPE.fullmatch(VERSION)


def test_the_client_has_the_version_of_the_release():
    assert darkroom_client.__version__ == VERSION
    assert USER_AGENT.startswith(f"darkroom-client/{VERSION} ")


@pytest.mark.parametrize(
    ("project", "module"),
    [
        ("pyproject.toml", "policy.version"),
        ("darkroom_client/pyproject.toml", "darkroom_client.version"),
    ],
)
def test_a_project_file_takes_the_version_from_the_code(project, module):
    """It must be a literal there: setuptools reads it without importing what the package needs."""
    parsed = tomllib.loads(text_of(project))

    assert "version" not in parsed["project"]
    assert parsed["project"]["dynamic"] == ["version"]
    assert parsed["tool"]["setuptools"]["dynamic"]["version"] == {"attr": f"{module}.VERSION"}
    assert found(f"{module.replace('.', '/')}.py", r'^VERSION = "(.*)"$') == [VERSION]


@pytest.mark.parametrize(("dockerfile", "title"), IMAGES.items())
def test_an_image_says_what_it_is_and_its_version(dockerfile, title):
    labels = labels_of(dockerfile)

    assert labels["version"] == VERSION
    assert labels["title"] == title
    assert labels["source"] == "${SOURCE_URL}"
    assert labels["licenses"] == tomllib.loads(text_of("pyproject.toml"))["project"]["license"]


@pytest.mark.parametrize(
    ("place", "pattern", "times"),
    [
        ("docker-compose.yml", r"image: darkroom-\S+:\$\{DARKROOM_TAG:-([^}]*)\}", 2),
        ("docker-compose.gpu.yml", r"image: darkroom-\S+:\$\{DARKROOM_TAG:-([^}]*)\}", 1),
        ("deploy/compose.env.example", r"^#DARKROOM_TAG=(.*)$", 1),
        ("docs/settings.md", r"^\| `DARKROOM_TAG` \| `([^`]*)` \|", 1),
    ],
)
def test_images_are_tagged_with_the_version(place, pattern, times):
    assert found(place, pattern) == [VERSION] * times


def test_messages_to_receivers_say_the_version():
    assert f"Darkroom/{VERSION}" == outbound.USER_AGENT


def test_the_changelog_ends_with_this_release_or_one_before_what_is_on_the_way():
    releases = found("CHANGELOG.md", HEADING)
    said = SHAPE.fullmatch(VERSION)

    assert len(found("CHANGELOG.md", "^## (.*)$")) == 1 + len(releases)
    assert found("CHANGELOG.md", "^## (.*)$")[0] == "[Unreleased]"
    assert releases == sorted(releases, key=sorted_by, reverse=True)
    if said["later"]:
        assert sorted_by(releases[0]) < sorted_by(said["release"])
    else:
        assert releases[0] == VERSION
