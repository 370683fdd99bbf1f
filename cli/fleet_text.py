"""Write into the text of a fleet.toml, and leave all else of it as its operator wrote it.

Comments, order and spacing stay. What was changed is read again and compared with what was meant,
so a file of an unforeseen shape is refused rather than spoilt. Pure: text in, text out.
"""

from __future__ import annotations

import copy
import json
import tomllib
from collections.abc import Mapping
from typing import Any

import tomlkit
from tomlkit.items import AoT, Table

_TABLES_OF_A_MODEL = ("tiers", "adapters")


class NotWritable(Exception):
    """The file has a shape that cannot be changed safely; the message says what to do by hand."""


def model_text(name: str, table: Mapping[str, Any]) -> str:
    """Write the tables of one model, versions last."""
    plain = {
        key: each for key, each in table.items() if key not in (*_TABLES_OF_A_MODEL, "versions")
    }
    model = _table(plain)
    for kind in _TABLES_OF_A_MODEL:
        if own := table.get(kind):
            group = tomlkit.table(is_super_table=True)
            for key, each in own.items():
                group.add(key, _table(each))
            model.add(kind, group)
    versions = AoT([])
    for version in table["versions"]:
        digests = version.get("sha256")
        entry = _table({key: each for key, each in version.items() if key != "sha256"})
        if digests:
            entry.add("sha256", _table(digests))
        versions.append(entry)
    model.add("versions", versions)
    return _dumped("models", name, model)


def digests_text(name: str, digests: Mapping[str, str]) -> str:
    """Write the table of a version's digests, to be put below the version of model `name`."""
    versions = tomlkit.table(is_super_table=True)
    versions.add("sha256", _table(digests))
    model = tomlkit.table(is_super_table=True)
    model.add("versions", versions)
    return _dumped("models", name, model)


def with_model(text: str, name: str, table: Mapping[str, Any], pool: str) -> str:
    """Return the file's text with one more model, which lives in `pool`.

    Raises NotWritable.
    """
    document = tomlkit.parse(text)
    meant = copy.deepcopy(tomllib.loads(text))
    meant["models"][name] = dict(table)
    meant["pools"][pool]["models"].append(name)
    document["pools"][pool]["models"].append(name)
    changed = f"{tomlkit.dumps(document).rstrip()}\n\n{model_text(name, table)}"
    try:
        is_as_meant = tomllib.loads(changed) == _plain(meant)
    except tomllib.TOMLDecodeError:
        is_as_meant = False
    if not is_as_meant:
        raise NotWritable(
            f"pools.{pool}.models: cannot be changed in this file; add {json.dumps(name)} to it,"
            " and the table of `--print` to the file, by hand"
        )
    return changed


def _table(values: Mapping[str, Any]) -> Table:
    """Make a table whose own tables stand on one line each."""
    table = tomlkit.table()
    for key, value in values.items():
        if isinstance(value, Mapping):
            inline = tomlkit.inline_table()
            inline.update(value)
            table.add(key, inline)
        else:
            table.add(key, list(value) if isinstance(value, tuple) else value)
    return table


def _dumped(group: str, name: str, table: Table) -> str:
    tables = tomlkit.table(is_super_table=True)
    tables.add(name, table)
    document = tomlkit.document()
    document.add(group, tables)
    return tomlkit.dumps(document)


def _plain(given: Any) -> Any:
    """Return a value as tomllib reads it: no tuples, no empty tables of tables."""
    if isinstance(given, Mapping):
        plain = {key: _plain(each) for key, each in given.items()}
        return {key: each for key, each in plain.items() if each != {}}
    return [_plain(each) for each in given] if isinstance(given, list | tuple) else given
