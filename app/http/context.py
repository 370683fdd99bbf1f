"""Give a request the runtime of its process, and its caller."""

from flask import current_app, g

from app.caller import Caller
from app.runtime import Runtime


def runtime() -> Runtime:
    """Return the runtime that answers the current request."""
    found: Runtime = current_app.extensions["darkroom"]
    return found


def caller() -> Caller:
    """Return the caller that `auth.require_key` found."""
    found: Caller = g.caller
    return found
