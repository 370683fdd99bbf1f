"""GET /v1/jobs/{id}/events against the running gateway: what a client of server-sent events reads."""

import json

import httpx
import pytest


def read(api, job, *, after=None, **query):
    """The events of a stream until it ends: (id, kind, data), in order."""
    headers = {"Last-Event-ID": after} if after else {}
    with api.stream("GET", f"/v1/jobs/{job['id']}/events", params=query, headers=headers) as answer:
        assert answer.status_code == 200, answer.read()
        return list(events_of(answer))


def events_of(answer):
    fields = {}
    for line in answer.iter_lines():
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        else:
            if "event" in fields:
                yield fields.get("id"), fields["event"], json.loads(fields["data"])
            fields = {}


def test_x(api, stack):
    import time
    job = api.post("/v1/jobs", json={"prompt": "a red circle", "n": 2, "seed": 7, "steps": 50, "tier": "quality"}).json()
    t = time.time()
    with api.stream("GET", f"/v1/jobs/{job['id']}/events", params={"previews": "true"}) as answer:
        print(answer.headers)
        for e in events_of(answer):
            print(round(time.time() - t, 2), e[0], e[1], str(e[2])[:150])
    t = time.time()
    print(read(api, job, previews="true")[-3:])
    print(time.time() - t)
    print(stack.env)
    t = time.time(); stack.restart("gateway") if hasattr(stack, "restart") else None
