"""Crosses of parameters of which `make test` runs a sample, and `make test-all` everything."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest


def in_turn(*axes: Sequence[Any]) -> list[Any]:
    """Every combination of the axes, as `parametrize` takes them; most of them are slow.

    The others have every combination of all axes but the last one, with one value of that, by turns
    another.
    """
    found = []
    for places in product(*(range(len(axis)) for axis in axes)):
        *others, last = places
        marks = [] if last == sum(others) % len(axes[-1]) else [pytest.mark.slow]
        values = (axis[place] for axis, place in zip(axes, places, strict=True))
        found.append(pytest.param(*values, marks=marks))
    return found
