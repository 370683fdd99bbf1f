"""Read a file of prompts.

Each line is a prompt as text, or a JSON object with any fields of a job's request. Or the whole
file is one JSON list of these. What begins like JSON is JSON or an error that names its line, never
a prompt, because a job costs money.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

_LINE_ENDS = re.compile(r"\r\n|\n|\r")  # and no others: Unicode's may stand in a prompt
_NO_FIELDS = ("self", "idempotency_key")  # words of the client that asks, not of a job
_HINT = 'A prompt that begins like this is written {"prompt": "…"}.'


class BadLine(Exception):
    """Report a line that is no prompt; the message names it."""


@dataclass(frozen=True)
class PromptLine:
    """Hold a prompt, its number in the file, and the other fields that its line sets."""

    number: int
    prompt: str
    fields: dict[str, Any]


def decoded(content: bytes) -> str:
    """Decode a file's UTF-8 text, without a byte order mark. Raises BadLine."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise BadLine(f"line {number} is not UTF-8: {error}. Save the file as UTF-8.") from None


def read(text: str) -> list[PromptLine]:
    """Return every line that is not blank, with its number in the file.

    Of a JSON list, returns every entry with its position. Raises BadLine.
    """
    whole = _whole(text)
    if whole is not None:
        return [_line(number, f"entry {number}", entry) for number, entry in enumerate(whole, 1)]
    lines = (
        (number, line.lstrip("\ufeff").strip())
        for number, line in enumerate(_LINE_ENDS.split(text), 1)
    )
    return [
        _line(number, f"line {number}", _parsed(number, line)) for number, line in lines if line
    ]


def _whole(text: str) -> list[Any] | None:
    """Return the entries of a file that is one JSON document; None for one read line by line.

    Raises BadLine.
    """
    if not text.lstrip().startswith(("[", "{")):
        return None
    try:
        document = json.loads(text)
    except ValueError as error:
        if text.lstrip().startswith("{"):  # objects, one a line
            return None
        number = getattr(error, "lineno", 1)
        raise BadLine(
            f"line {number}: the file begins like a JSON list but cannot be read as one: {error}."
            f" {_HINT}"
        ) from None
    except RecursionError:
        raise BadLine("line 1: the file is nested too deeply") from None
    return document if isinstance(document, list) else [document]


def _parsed(number: int, line: str) -> Any:
    """Return a line's text, or its value if it is JSON. Raises BadLine."""
    is_string = line.startswith('"') and line.endswith('"')
    if not line.startswith(("{", "[")) and not is_string:
        return line
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        if is_string:  # "this" and "that"
            return line
        raise BadLine(
            f"line {number} begins like JSON but cannot be read: {error}. {_HINT}"
        ) from None


def _line(number: int, place: str, said: Any) -> PromptLine:
    if isinstance(said, str):
        return PromptLine(number, said, {})
    if not isinstance(said, dict):
        raise BadLine(f"{place} is neither a text nor an object with the fields of a job. {_HINT}")
    fields = dict(said)
    prompt = fields.pop("prompt", None)
    if not isinstance(prompt, str):
        raise BadLine(f'{place} has no "prompt"')
    if unknown := [name for name in _NO_FIELDS if name in fields]:
        raise BadLine(f'{place}: "{unknown[0]}" is not a field of a job')
    return PromptLine(number, prompt, fields)
