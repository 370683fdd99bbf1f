"""Write the headers that tell how much of its limits a tenant has left.

They are `RateLimit-Policy` and `RateLimit` of draft-ietf-httpapi-ratelimit-headers, with one policy
for each limit per minute.
"""

import math

from flask import Response, g

from app.caller import Caller
from edges.limits import WINDOW_S


def add_ratelimit_headers(response: Response) -> None:
    """Add the caller's limits and what is left of them to the headers."""
    asking: Caller | None = g.get("caller")
    if asking is None:
        return
    limits = asking.limits
    policies = []
    stands = []
    counted = asking.used.requests
    if counted is not None:
        policies.append(f'"requests";q={limits.requests_per_minute};w={WINDOW_S}')
        stands.append(f'"requests";r={counted.remaining};t={counted.reset_s}')
    if limits.megapixel_steps_per_minute is not None:
        policies.append(f'"megapixel-steps";q={limits.megapixel_steps_per_minute:.0f};w={WINDOW_S}')
        taken = asking.used.budget
        if taken is not None:
            remaining = max(0, math.floor(taken.left))
            stands.append(f'"megapixel-steps";r={remaining};t={math.ceil(taken.wait_s)}')
    if policies:
        response.headers["RateLimit-Policy"] = ", ".join(policies)
    if stands:
        response.headers["RateLimit"] = ", ".join(stands)
