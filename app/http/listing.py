"""Read the query of GET /v1/jobs: which jobs, how many, from where on.

Unknown parameters are refused by name.
"""

import re
from datetime import datetime

from werkzeug.datastructures import MultiDict

from app.http.pages import DEFAULT_PAGE, parse_cursor, parse_limit
from app.problems import InvalidQuery
from models.ids import first_id
from models.listing import JobFilter
from policy.states import JobState
from policy.text import is_human

PARAMETERS = ("limit", "cursor", "state", "created_after", "created_before", "metadata.<key>")
METADATA = "metadata."
_INSTANT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d:\d\d)", re.ASCII)


def read_query(query: MultiDict[str, str]) -> tuple[JobFilter, int]:
    """Return the filter and the page size. Raises InvalidQuery, which names the parameter."""
    said = {}
    metadata = {}
    for name, values in query.lists():
        _check(name, values)
        if name.startswith(METADATA):
            metadata[name.removeprefix(METADATA)] = values[0]
        else:
            said[name] = values[0]
    before = []
    if "created_before" in said:
        before.append(first_id(read_instant("created_before", said["created_before"])))
    if "cursor" in said:
        before.append(parse_cursor(said["cursor"]))
    bounds = {"before": min(before)} if before else {}
    if "created_after" in said:
        bounds["since"] = first_id(read_instant("created_after", said["created_after"]))
    job_filter = JobFilter(**bounds, state=_state(said.get("state")), metadata=metadata)
    return job_filter, parse_limit(said.get("limit", str(DEFAULT_PAGE)))


def read_instant(parameter: str, text: str) -> datetime:
    """Parse an RFC 3339 instant with its offset. Raises InvalidQuery."""
    try:
        if _INSTANT.fullmatch(text.upper()):
            return datetime.fromisoformat(text.upper())
    except ValueError:
        pass
    accepted = "2026-11-26T18:00:00Z"
    raise InvalidQuery(
        f"{parameter} must be an instant such as {accepted}; write + in an offset as %2B.",
        parameter=parameter,
        accepted=accepted,
    )


def _check(name: str, values: list[str]) -> None:
    shown = name[:64]
    if name not in PARAMETERS[:-1] and not name.startswith(METADATA):
        raise InvalidQuery(
            f"There is no query parameter {shown!r}.", parameter=shown, accepted=list(PARAMETERS)
        )
    if len(values) > 1:
        raise InvalidQuery(f"{shown} is given {len(values)} times; give it once.", parameter=shown)
    if name.startswith(METADATA) and not (len(name) > len(METADATA) and is_human(name + values[0])):
        raise InvalidQuery(
            "metadata.<key>=<value> needs a key, and a value without control characters.",
            parameter=shown,
        )


def _state(text: str | None) -> str | None:
    if text is not None and text not in list(JobState):
        raise InvalidQuery(
            f"state {text[:32]!r} is not a job state.",
            parameter="state",
            accepted=[state.value for state in JobState],
        )
    return text
