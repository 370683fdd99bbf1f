"""A file of prompts: one a line, or JSON objects with any fields of a job's request."""

import json
from dataclasses import dataclass
from typing import Any


class BadLine(Exception):
    """A line that is no prompt; the message names it."""


@dataclass(frozen=True)
class Line:
    """A prompt, where it stands, and what it says itself beside."""

    number: int
    prompt: str
    wish: dict[str, Any]


def read(text: str) -> list[Line]:
    """Every line that is not blank, under its number in the file. Raises BadLine."""
    return [_line(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _line(number: int, text: str) -> Line:
    if not text.startswith("{"):
        return Line(number, text, {})
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise BadLine(f"line {number} begins as JSON does and is none: {error}") from None
    prompt = fields.pop("prompt", None)
    if not isinstance(prompt, str):
        raise BadLine(f'line {number} has no "prompt"')
    return Line(number, prompt, fields)
