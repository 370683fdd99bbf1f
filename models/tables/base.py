"""Share what every table needs: the registry, types of columns, the database's clock."""

from collections.abc import Iterable
from datetime import date, datetime
from decimal import Decimal
from enum import StrEnum
from typing import Any

from sqlalchemy import ARRAY, Date, DateTime, LargeBinary, Numeric, Text, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase

NOW = text("clock_timestamp()")
Megapixels = Numeric(18, 6)  # width x height / 1,000,000 has six decimals at most


class Base(DeclarativeBase):
    type_annotation_map = {
        datetime: DateTime(timezone=True),
        date: Date,
        str: Text,
        dict[str, Any]: JSONB(none_as_null=True),
        list[dict[str, Any]]: JSONB(none_as_null=True),
        list[str]: ARRAY(Text),
        bytes: LargeBinary,
        Decimal: Numeric(14, 6),
    }


def listed(values: Iterable[StrEnum]) -> str:
    """Write values of an enumeration as SQL's `IN` takes them."""
    return "(" + ", ".join(f"'{value.value}'" for value in values) + ")"
