"""The documents that people read say all that there is, and their examples work."""

import json
import os
import re
import subprocess
import sys
import tomllib
import uuid
from pathlib import Path
from typing import Any

import click
import psycopg2
import pytest
from pydantic import BaseModel

from app.problems import Problem, invalid_param
from app.spec.operations import OPERATIONS
from cli.main import darkroom
from fleet.stack import Stack
from policy import warnings
from policy.catalog import resolve
from policy.cost import pool_cost, price
from policy.failures import FailureCode
from policy.fleet import Adapter, Fleet, Model, ModelTier, ModelVersion, Pool, Tier, parse_fleet
from policy.limits import LIMITS, SCOPES
from policy.params import RequestedParams
from policy.refusals import InvalidParam
from policy.states import JobState
from policy.webhooks import EVENTS
from settings import REPO
from tests.documents import (
    PAGES,
    Example,
    anchors_of,
    examples,
    links_of,
    name_of,
    quoted,
    section,
    text_of,
    without_fences,
    words_quoted,
)
from tests.edges.test_metric_names import COUNTERS, GAUGES, HISTOGRAMS

EXAMPLES = examples()
LANGUAGES = {"sh", "python", "sql", "toml", "json"}  # these are run or parsed
OTHERS = {"text", "nginx", "ini"}  # these are not
MOST_README_LINES = 150
VIEWS = sorted(file.stem for file in (REPO / "models/sql/views").glob("*.sql"))


def of(language: str) -> list[Example]:
    """The examples in a language that are to be run."""
    return [each for each in EXAMPLES if each.language == language and not each.reason]


def missing(names: set[str] | list[str], text: str) -> list[str]:
    """Name what does not stand in backquotes in the text."""
    return sorted(set(names) - quoted(text))


# --- What a page has to say --------------------------------------------------------------------


def test_the_readme_is_short_and_leads_to_every_page():
    readme = text_of("README.md")
    linked = {target.partition("#")[0] for page in PAGES for target in from_root(page)}

    assert len(readme.splitlines()) <= MOST_README_LINES
    assert {name_of(page) for page in PAGES} - linked <= {"README.md"}


def from_root(page: Path) -> list[str]:
    """The targets of a page's links, as paths from the repository's root."""
    folder = page.parent
    return [
        os.path.relpath((folder / target).resolve(), REPO)
        for target in links_of(page)
        if not target.startswith("#")
    ]


def test_the_api_page_has_every_route_and_no_other():
    page = text_of("docs/api.md")
    routes = {f"{method} {path}" for method, path in OPERATIONS}
    rows = "".join(
        re.findall(
            r"^\| `(?:GET|POST|PATCH|DELETE) .*$", section("docs/api.md", "## Routes"), re.MULTILINE
        )
    )
    told = {each for each in quoted(rows) if re.match(r"(GET|POST|PATCH|PUT|DELETE) /", each)}

    assert missing(routes, page) == []
    assert told - routes == {"GET /openapi.json", "GET /docs", "GET /links/images/{artifact_id}"}


def test_the_api_page_says_who_may_ask_for_what():
    wrong = []
    for (method, path), operation in OPERATIONS.items():
        row = next(
            (
                line
                for line in section("docs/api.md", "## Routes").splitlines()
                if line.startswith(f"| `{method} {path}`")
            ),
            "",
        )
        scope = "read" if method == "GET" else "generate"
        scope = "admin" if path.startswith("/v1/admin") else scope
        scope = "read or generate" if path == "/v1/estimate" else scope
        if operation.needs_key and f"| {scope} |" not in row:
            wrong.append(f"{method} {path}: {scope}")

    assert wrong == []


def test_the_api_page_has_every_type_of_problem_with_its_status():
    rows = [
        line
        for line in section("docs/api.md", "## Errors").splitlines()
        if re.match(r"\| \d{3} \|", line)
    ]
    told = {slug: int(row[2:5]) for row in rows for slug in quoted(row.split("|")[2])}

    assert told == {kind.slug: kind.status for kind in Problem.__subclasses__()}


@pytest.mark.parametrize(
    ("heading", "names"),
    [
        ("## Job states", [state.value for state in JobState]),
        ("### Failure codes", [code.value for code in FailureCode]),
        ("### Warnings", [warnings.TRUNCATED, warnings.IGNORED]),
        ("### Event stream", ["queued", "started", "step", "preview", "stored", "final"]),
        ("## Webhooks", EVENTS),
        ("## Keys and scopes", SCOPES),
        ("## Rate limits and quotas", LIMITS),
    ],
)
def test_the_api_page_has_every_name(heading, names):
    assert missing(list(names), section("docs/api.md", heading)) == []


def every_command() -> list[str]:
    """The commands of the command line, with those of its groups."""
    context = click.Context(darkroom)
    found = []
    for name in darkroom.list_commands(context):
        command = darkroom.get_command(context, name)
        if isinstance(command, click.Group):
            found += [f"{name} {each}" for each in command.list_commands(context)]
        else:
            found.append(name)
    return found


def test_the_page_on_operating_has_every_command_and_no_other():
    page = text_of("docs/operating.md")
    commands = every_command()
    said = re.findall(r"\./darkroom (?:--data-dir \S+ )?([a-z]+(?: [a-z]+)?)", page)

    assert [name for name in commands if not re.search(rf"(\./darkroom |`){name}\b", page)] == []
    known = {*commands, *(name.partition(" ")[0] for name in commands)}
    assert [
        words for words in said if words not in known and words.partition(" ")[0] not in known
    ] == []


def test_the_page_on_operating_has_every_metric():
    told = set(re.findall(r"`(darkroom_\w+)", text_of("docs/operating.md")))

    assert sorted({*COUNTERS, *HISTOGRAMS, *GAUGES} - told) == []


@pytest.mark.parametrize(
    "table", [Tier, Model, ModelTier, ModelVersion, Adapter, Pool], ids=lambda table: table.__name__
)
def test_the_page_on_models_has_every_key_of_fleet_toml(table):
    page = text_of("docs/models.md")

    assert sorted(set(table.model_fields) - words_quoted(page)) == []
    assert sorted({*Fleet.model_fields} - set(re.findall(r"\w+", page))) == []


def test_the_page_on_sql_has_every_view_with_every_column(stack):
    page = text_of("docs/sql.md")
    columns = (
        "SELECT table_name, column_name FROM information_schema.columns WHERE table_name = ANY(%s)"
    )
    with connected(stack) as cursor:
        cursor.execute(columns, (VIEWS,))
        found = cursor.fetchall()

    assert {view for view, _ in found} == set(VIEWS)
    assert [view for view in VIEWS if f"\n### {view}\n" not in page] == []
    assert (
        sorted({f"{view}.{column}" for view, column in found if column not in words_quoted(page)})
        == []
    )


def test_the_error_that_the_api_page_shows_is_what_the_gateway_answers():
    shown = next(json.loads(each.text) for each in of("json") if "/problems/" in each.text)
    shipped = parse_fleet(text_of("fleet.toml"))

    with pytest.raises(InvalidParam) as refused:
        resolve(
            shipped,
            RequestedParams(prompt="a star", tier="fast", steps=900),
            default_seed=7,
        )

    problem = invalid_param(refused.value)
    del shown["instance"]
    assert shown == json.loads(json.dumps({**problem.summary(), "error": problem.openai_error()}))


def test_the_prices_that_the_page_on_cost_shows_are_those_of_the_shipped_file():
    page = text_of("docs/cost.md")
    shipped = parse_fleet(text_of("fleet.toml"))
    amount = price(shipped, tier="fast", cost=pool_cost(shipped, "local", 0.5))
    weights = ", ".join(f"{tier.price_weight} for `{name}`" for name, tier in shipped.tiers.items())

    assert f"= {amount} {shipped.currency}" in page
    assert f"{shipped.pools['local'].gpu_hour_price:.2f} {shipped.currency} an hour" in page
    assert weights in page


# --- Links -------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [*PAGES, REPO / "CHANGELOG.md"], ids=name_of)
def test_every_link_and_anchor_leads_somewhere(page):
    broken = []
    for target in links_of(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (
            anchor and file.suffix == ".md" and anchor not in anchors_of(file)
        ):
            broken.append(target)

    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_file_that_a_page_names_exists(page):
    named = {
        each
        for each in quoted(without_fences(page.read_text()))
        if re.fullmatch(r"[\w.-]+/[\w./-]+\.(md|py|toml|sql|conf)", each)
    }

    assert {each for each in named if not (REPO / each).exists()} == set()


def test_a_page_that_code_or_a_setting_names_exists():
    entries = [entry for entry in REPO.iterdir() if not entry.name.startswith(".")]
    files = [
        file
        for entry in entries
        for file in (entry.rglob("*") if entry.is_dir() else [entry])
        if file.suffix in (".py", ".md", ".toml", ".yml", ".example", ".sql", ".conf")
    ]
    named = {
        (str(file.relative_to(REPO)), page)
        for file in files
        for page in re.findall(r"\bdocs/\w+\.md", file.read_text(errors="replace"))
    }

    assert {page for _, page in named} & {"docs/engine.md", "docs/cost.md"}
    assert [place for place in sorted(named) if not (REPO / place[1]).exists()] == []


# --- Examples ----------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [*PAGES, REPO / "CHANGELOG.md"], ids=name_of)
def test_no_line_of_prose_is_longer_than_100_columns(page):
    lines = without_fences(page.read_text()).splitlines()

    assert [line for line in lines if len(line) > 100 and not line.lstrip().startswith("|")] == []


def test_every_example_says_its_language():
    assert [each.place for each in EXAMPLES if each.language not in LANGUAGES | OTHERS] == []


def test_examples_that_are_not_run_say_why(record_property):
    """The reasons are few, so that nobody marks an example to be rid of it."""
    reasons: dict[str, list[str]] = {}
    for each in EXAMPLES:
        if each.reason:
            reasons.setdefault(each.reason, []).append(each.place)
    for reason, places in sorted(reasons.items()):
        print(f"{reason}: {', '.join(places)}")
        record_property(reason, places)

    assert "no reason" not in reasons


def test_commands_are_fenced():
    """An indented block would be run by nobody."""
    command = re.compile(
        r"^ {4,}(\./darkroom|darkroom|docker|make|curl|pip|python) .*$", re.MULTILINE
    )
    found = {name_of(page): command.findall(without_fences(page.read_text())) for page in PAGES}

    assert {name for name, commands in found.items() if commands} == set()


@pytest.mark.parametrize("example", of("json"), ids=lambda example: example.place)
def test_a_json_example_is_json(example):
    json.loads(example.text)


TABLES: dict[str, type[BaseModel]] = {"tiers": Tier, "models": Model, "pools": Pool}


@pytest.mark.parametrize("example", of("toml"), ids=lambda example: example.place)
def test_a_toml_example_fits_the_fleet_s_file(example):
    parsed = tomllib.loads(example.text)
    if "project" in parsed or not parsed.keys() & TABLES.keys():
        return
    unknown = [
        f"{kind}.{name}.{key}"
        for kind, table in TABLES.items()
        for name, entry in parsed.get(kind, {}).items()
        for key in entry
        if key not in table.model_fields
    ]

    assert unknown == []
    if "family" in example.text and "pools" in parsed:
        parse_fleet(_beside_the_shipped(parsed, example.text))


def test_the_page_on_models_has_a_whole_table_for_every_kind_of_checkpoint():
    whole = [
        tomllib.loads(each.text)
        for each in of("toml")
        if name_of(each.page) == "docs/models.md" and "family" in each.text
    ]

    assert all("pools" in tables for tables in whole)
    assert [name for tables in whole for name in tables["models"]] == [
        "sd1.5",
        "sdxl",
        "sd3.5",
        "FLUX.1-dev",
        "FLUX.1-schnell",
        "FLUX.1-Fill-dev",
        "kontext",
        "canny",
    ]


def _beside_the_shipped(parsed: dict[str, Any], text: str) -> str:
    """The fleet.toml that ships, with the example in place of the kinds of tables that it has."""
    shipped = (REPO / "fleet.toml").read_text()
    for kind in TABLES.keys() & parsed.keys():
        shipped = re.sub(rf"^\[\[?{kind}\..*\n(?:(?!\[).*\n?)*", "", shipped, flags=re.MULTILINE)
    return f"{shipped}\n{text}"


def connected(stack: Stack, login: str = "MIGRATION_DATABASE_URL"):
    """A cursor of a transaction that comes to nothing."""
    connection = psycopg2.connect(stack.env[login].replace("+psycopg2", ""))
    connection.set_session(readonly=login == "AUDITOR_DATABASE_URL")

    class Cursor:
        def __enter__(self):
            return connection.cursor()

        def __exit__(self, *error):
            connection.rollback()
            connection.close()

    return Cursor()


@pytest.mark.parametrize("example", of("sql"), ids=lambda example: example.place)
def test_an_sql_example_runs(stack, example):
    """Those of the page on SQL as the auditor, the others as the owner of the tables."""
    login = (
        "AUDITOR_DATABASE_URL"
        if name_of(example.page) == "docs/sql.md"
        else "MIGRATION_DATABASE_URL"
    )
    nobody = "'00000000-0000-0000-0000-000000000000'"

    with connected(stack, login) as cursor:
        cursor.execute("SET statement_timeout = '20s'")
        cursor.execute(example.text.replace("'…'", nobody))


@pytest.fixture(scope="module")
def workplace(stack, tmp_path_factory):
    """A folder that looks like the repository on a machine where the stack runs, and its
    environment.
    """
    folder = tmp_path_factory.mktemp("workplace")
    for entry in REPO.iterdir():
        if entry.name not in (".git", ".darkroom"):
            (folder / entry.name).symlink_to(entry)
    (folder / ".darkroom").symlink_to(stack.data_dir)
    environment = {
        "PATH": f"{REPO / '.venv/bin'}:{os.environ['PATH']}",
        "HOME": str(folder),
        "LANG": "C.UTF-8",
        "NO_PROXY": "127.0.0.1,localhost",
        "DARKROOM_DATA_DIR": str(stack.data_dir),
        "DARKROOM_URL": stack.env["DARKROOM_URL"],
        "DARKROOM_API_KEY": stack.env["DARKROOM_API_KEY"],
        "PYTHONPATH": str(REPO),
    }
    return folder, environment


def ran(workplace, command: list[str], text: str) -> subprocess.CompletedProcess[str]:
    folder, environment = workplace
    return subprocess.run(
        command,
        input=text,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


# A refusal of the gateway ends the script, as an error of a command does.
STRICT = 'set -eu\ncurl() { command curl --fail-with-body "$@"; }\n'


@pytest.mark.parametrize("page", sorted({each.page for each in of("sh")}), ids=name_of)
def test_the_commands_of_a_page_run_one_after_the_other(workplace, page):
    script = "\n".join(
        f"echo '== line {each.line}'\n{each.text}" for each in of("sh") if each.page == page
    )

    # The pages' tenant, by a name that no other test of this stack gives one.
    own = script.replace("acme", f"acme-{uuid.uuid4().hex[:8]}")

    done = ran(workplace, ["bash"], STRICT + own)

    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


@pytest.mark.parametrize("example", of("python"), ids=lambda example: example.place)
def test_a_python_example_runs(workplace, example):
    done = ran(workplace, [sys.executable, "-"], example.text)

    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
