"""The names of audit events: one list, with a grammar; nothing is appended under another name."""

import ast
import re

import pytest

from migrations import living
from models.audit_events import EventName
from settings import REPO

NAME = re.compile(r"[a-z]+(?:-[a-z]+)*:[a-z]+(?:-[a-z]+)*:[a-z]+(?:-[a-z]+)*")
NOT_IN_ED = {"taken", "lost", "left"}  # past tenses all the same
ROOMS = ("app", "cli", "dispatch", "edges", "fleet", "migrations", "models", "policy", "tasks")
BY_SQL = {"job:request:accepted": "accept_jobs", "audit:month:pruned": "audit_prune_month"}


def modules() -> list:
    return [path for room in ROOMS for path in sorted((REPO / room).rglob("*.py"))]


def literals(path) -> set[str]:
    """Texts in a module that are names of events, docstrings left out."""
    nodes = ast.walk(ast.parse(path.read_text()))
    texts = {
        node.value
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    return {value for value in texts if NAME.fullmatch(value)}


@pytest.mark.parametrize("name", EventName)
def test_an_event_s_name_is_subject_aspect_and_past_tense(name):
    verb = name.value.rpartition(":")[2].partition("-")[0]

    assert NAME.fullmatch(name.value)
    assert verb.endswith("ed") or verb in NOT_IN_ED
    assert name.name == re.sub("[:-]", "_", name.value).upper()


def test_event_names_are_written_in_one_place():
    written = {str(path.relative_to(REPO)) for path in modules() if literals(path)}

    assert written == {"models/audit_events.py"}


def test_every_append_names_its_event_by_the_list():
    loose = []
    for path in modules():
        for function in (
            node
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.FunctionDef)
        ):
            source = ast.unparse(function)
            for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
                if ast.unparse(call.func) in ("audit.append", "audit.append_of_attempt"):
                    event = ast.unparse(call.args[1])
                    named = event.startswith("EventName.") or re.search(
                        rf"\b{event}\b[^=\n]*= \(?EventName\.", source
                    )
                    loose += [] if named else [f"{path.relative_to(REPO)}: {event}"]

    assert loose == []


@pytest.mark.parametrize("name", EventName)
def test_every_event_is_appended_somewhere(name):
    used = f"EventName.{name.name}"
    by_python = any(re.search(rf"{used}\b", path.read_text()) for path in modules())

    assert by_python != (name.value in BY_SQL)


def test_sql_appends_events_of_the_list_only():
    found = {
        name: each.name
        for each in living.read()
        for name in re.findall(rf"'({NAME.pattern})'", each.sql)
        if "INSERT INTO audit_events" in each.sql
    }
    read = {name for each in living.read() for name in re.findall(rf"'({NAME.pattern})'", each.sql)}

    assert found == BY_SQL
    assert read <= set(EventName)
