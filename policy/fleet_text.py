"""Write into the text of a fleet.toml, and leave all else of it as its operator wrote it.

Comments, order and spacing stay. What was changed is read again and compared with what was meant,
so a file of an unforeseen shape is refused rather than spoilt. Pure: text in, text out.
"""

from __future__ import annotations

import copy
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from policy.fleet import toml_key

_HEADER = re.compile(r"^\s*\[")
_MODELS = re.compile(r"^\s*models\s*=\s*\[")


class NotWritable(Exception):
    """The file has a shape that cannot be changed safely; the message says what to do by hand."""


def model_text(name: str, table: Mapping[str, Any]) -> str:
    """Write the tables of one model, versions last."""
    key = f"models.{toml_key(name)}"
    lines = [f"[{key}]"]
    tables = ("tiers", "adapters", "versions")
    lines += [f"{toml_key(name)} = {value(v)}" for name, v in table.items() if name not in tables]
    for kind in ("tiers", "adapters"):
        for entry, own in table.get(kind, {}).items():
            lines += ["", f"[{key}.{kind}.{toml_key(entry)}]"]
            lines += [f"{toml_key(name)} = {value(v)}" for name, v in own.items()]
    for version in table["versions"]:
        lines += ["", f"[[{key}.versions]]"]
        lines += [
            f"{toml_key(name)} = {value(v)}" for name, v in version.items() if name != "sha256"
        ]
        lines += digests_lines(f"{key}.versions.sha256", version.get("sha256", {}))
    return "\n".join(lines) + "\n"


def digests_lines(key: str, digests: Mapping[str, str]) -> list[str]:
    """Write the table of a version's digests; nothing where there are none."""
    if not digests:
        return []
    return ["", f"[{key}]", *(f"{toml_key(name)} = {value(v)}" for name, v in digests.items())]


def value(given: Any) -> str:
    """Write one value as TOML does."""
    if isinstance(given, bool):
        return "true" if given else "false"
    if isinstance(given, str):
        return json.dumps(given, ensure_ascii=False)
    if isinstance(given, datetime):
        return given.isoformat().replace("+00:00", "Z")
    if isinstance(given, Mapping):
        inner = ", ".join(f"{toml_key(key)} = {value(each)}" for key, each in given.items())
        return f"{{ {inner} }}"
    if isinstance(given, list | tuple):
        return f"[{', '.join(map(value, given))}]"
    return repr(given)


def with_model(text: str, name: str, table: Mapping[str, Any], pool: str) -> str:
    """Return the file's text with one more model, which lives in `pool`.

    Raises NotWritable.
    """
    changed = f"{_with_member(text, pool, name).rstrip()}\n\n{model_text(name, table)}"
    meant = copy.deepcopy(tomllib.loads(text))
    meant["models"][name] = dict(table)
    meant["pools"][pool]["models"].append(name)
    try:
        is_as_meant = tomllib.loads(changed) == _plain(meant)
    except tomllib.TOMLDecodeError:
        is_as_meant = False
    if not is_as_meant:
        raise NotWritable(_by_hand(pool, name))
    return changed


def _plain(given: Any) -> Any:
    """Return a value as tomllib reads it: no tuples, no empty tables of tables."""
    if isinstance(given, Mapping):
        plain = {key: _plain(each) for key, each in given.items()}
        return {key: each for key, each in plain.items() if each != {}}
    return [_plain(each) for each in given] if isinstance(given, list | tuple) else given


def _with_member(text: str, pool: str, name: str) -> str:
    """Add a name to the list of a pool's models. Raises NotWritable."""
    lines = text.splitlines(keepends=True)
    headers = {f"[pools.{pool}]", f'[pools."{pool}"]'}
    inside = False
    for number, line in enumerate(lines):
        if _HEADER.match(line) and not _MODELS.match(line):
            inside = line.partition("#")[0].strip() in headers
        elif inside and _MODELS.match(line):
            begin = sum(map(len, lines[:number])) + line.index("[")
            end = _end_of_list(text, begin)
            if end is not None:
                return _with_entry(text, end, json.dumps(name))
    raise NotWritable(_by_hand(pool, name))


@dataclass(frozen=True)
class _ListEnd:
    """Where a list ends: behind its last value or comma, and at its bracket."""

    of_values: int
    bracket: int


def _with_entry(text: str, end: _ListEnd, entry: str) -> str:
    """Put one more entry into a list, on a line of its own where the others have theirs."""
    comma = "" if text[end.of_values - 1] in ",[" else ","
    head = text[: end.of_values] + comma
    between = text[end.of_values : end.bracket]
    if "\n" in between:
        notes, _, indent = between.rpartition("\n")
        return f"{head}{notes}\n{indent}    {entry},\n{indent}{text[end.bracket :]}"
    space = "" if head.endswith("[") else " "
    return f"{head}{space}{entry}{between}{text[end.bracket :]}"


def _end_of_list(text: str, begin: int) -> _ListEnd | None:
    """Find the end of the list whose bracket is at `begin`; None: it does not end."""
    quote = ""
    in_comment = False
    of_values = begin + 1
    for place in range(begin + 1, len(text)):
        letter = text[place]
        if in_comment:
            in_comment = letter != "\n"
            continue
        if quote:
            quote = "" if letter == quote and text[place - 1] != "\\" else quote
        elif letter in "\"'":
            quote = letter
        elif letter == "#":
            in_comment = True
            continue
        elif letter == "]":
            return _ListEnd(of_values, place)
        if not letter.isspace():
            of_values = place + 1
    return None


def _by_hand(pool: str, name: str) -> str:
    return (
        f"pools.{pool}.models: cannot be changed in this file; add {json.dumps(name)} to it, and "
        "the table of `--print` to the file, by hand"
    )
