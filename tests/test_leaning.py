"""docs/leaning.md names every private name of a library that the house uses, and who notices."""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from settings import REPO

PAGE = (REPO / "docs" / "leaning.md").read_text()
PRODUCT = (
    *(
        "app",
        "tasks",
        "engine",
        "models",
        "policy",
        "dispatch",
        "edges",
        "fleet",
        "cli",
        "darkroom_client",
    ),
    *("migrations", "deploy", "pocket", "settings.py", "celeryconfig.py"),
)
NO_LIBRARY = {"_exit", "_typeshed"}  # Python's own
LOOKS = {"getattr", "hasattr", "setattr"}


def modules() -> Iterator[Path]:
    for name in PRODUCT:
        place = REPO / name
        yield from sorted(place.rglob("*.py")) if place.is_dir() else [place]


def is_private(name: str) -> bool:
    return re.fullmatch(r"_[A-Za-z]\w*", name) is not None


def name_of(node: ast.AST) -> str:
    """A plain name; empty for any other expression."""
    return node.id if isinstance(node, ast.Name) else ""


def ours(tree: ast.AST) -> set[str]:
    """Private names that a module defines: functions, classes, variables, fields, attributes."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and name_of(node.value) in ("self", "sampler"):
            found |= {node.attr} if isinstance(node.ctx, ast.Store) else set()
    return {name for name in found if is_private(name)}


def used(tree: ast.AST) -> set[str]:
    """Private names that a module reads, imports or looks up on anything but `self`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and name_of(node.value) != "self":
            found.add(node.attr)
        elif isinstance(node, ast.Call) and name_of(node.func) in LOOKS:
            found |= {str(each.value) for each in node.args[1:2] if isinstance(each, ast.Constant)}
        elif isinstance(node, ast.ImportFrom):
            found |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
    return {name for name in found if is_private(name)}


def test_every_private_name_of_a_library_is_written_down():
    trees = [ast.parse(path.read_text(), str(path)) for path in modules()]
    foreign = set().union(*map(used, trees)) - set().union(*map(ours, trees)) - NO_LIBRARY

    assert foreign >= {"_queue_cycle", "_compiled_call_impl", "_repeated_blocks"}
    assert {name for name in foreign if not re.search(rf"\b{name}\b", PAGE)} == set()


def test_every_name_is_used_where_the_page_says():
    rows = [
        line.split("|")[1:3]
        for line in PAGE.splitlines()
        if line.startswith("| ") and ".py`" in line.split("|")[2]
    ]

    unused = []
    for names, places in rows:
        texts = "".join((REPO / path).read_text() for path in re.findall(r"`([\w/]+\.py)`", places))
        # `vars` reads `__dict__`
        named = [
            name.rpartition(".")[2] for name in re.findall(r"`([\w.]+)`", names) if "__" not in name
        ]
        unused += [f"{name}: {places.strip()}" for name in named if name not in texts]

    assert len(rows) > 20
    assert unused == []


def test_every_test_that_is_to_notice_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)

    assert len(named) > 20
    missing = [
        f"{file}::{name}"
        for file, name in named
        if not re.search(rf"^(async )?def {name}\(", (REPO / file).read_text(), re.MULTILINE)
    ]
    assert missing == []


def test_every_module_that_leans_exists():
    leaning = re.findall(r"`((?:app|deploy|edges|engine|fleet|tasks)/[\w/]*(?:\.py)?)`", PAGE)

    assert leaning
    assert [name for name in leaning if not (REPO / name).exists()] == []


@pytest.mark.parametrize(
    ("module", "owner", "name"),
    [
        ("kombu.transport.redis", "Channel", "_update_queue_cycle"),
        ("kombu.transport.redis", "Channel", "_queue_cycle"),
        ("kombu.transport.redis", "Channel", "_in_poll"),
        ("kombu.transport.redis", "Channel", "unacked_key"),
        ("kombu.transport.redis", "Channel", "unacked_index_key"),
        ("kombu.transport.virtual", "Channel", "do_restore"),
        ("kombu.transport.virtual", "Channel", "_qos"),
        ("kombu.transport.virtual", "QoS", "_quick_ack"),
        ("kombu", "Connection", "_default_channel"),
        ("kombu.message", "Message", "ack_log_error"),
        ("celery.worker.control", "Panel", "data"),
        ("celery.worker.consumer", "Consumer", "call_soon_ack"),
        ("gunicorn.workers.gthread", "ThreadWorker", "_keepalive_after"),
        ("gunicorn.workers.gthread", "ThreadWorker", "_cap_keepalive"),
        ("gunicorn.workers.gthread", "ThreadWorker", "murder_pending"),
        ("torch.nn", "Module", "_compiled_call_impl"),
        ("torch.nn", "Module", "_call_impl"),
        ("diffusers", "UNet2DConditionModel", "_repeated_blocks"),
        ("diffusers", "FluxTransformer2DModel", "_repeated_blocks"),
        ("diffusers", "StableDiffusionPipeline", "_num_timesteps"),
        ("diffusers", "DiffusionPipeline", "_load_connected_pipes"),
        ("diffusers", "DiffusionPipeline", "maybe_free_model_hooks"),
        ("transformers", "PretrainedConfig", "_attn_implementation"),
        ("urllib3.connectionpool", "HTTPConnectionPool", "ConnectionCls"),
        ("supervisor.xmlrpc", "SupervisorTransport", "request"),
    ],
)
def test_private_names_are_where_we_look_for_them(module, owner, name):
    """On the class, or given to its objects by its own code."""
    found = getattr(importlib.import_module(module), owner)

    assert hasattr(found, name) or re.search(rf"\bself\.{name}\b", inspect.getsource(found))


def test_torch_still_knows_the_options_that_fix_the_order_of_sums():
    from engine.acceleration import steady_options

    assert steady_options() == {"batch_invariant": True, "deterministic": True}


def test_flower_has_the_routes_that_are_taken_from_it():
    from flower import urls
    from flower.api import control, tasks

    handlers = [getattr(route, "handler_class", None) or route[1] for route in urls.handlers]

    assert {tasks.TaskApply, tasks.TaskAsyncApply, tasks.TaskSend, tasks.TaskAbort} <= {*handlers}
    assert any(handler.__module__ == control.__name__ for handler in handlers)
