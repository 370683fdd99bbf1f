"""The least that a route can do which must not lose a request: one durable INSERT and one LPUSH, in plain Flask.

Served by the gateway's own gunicorn configuration, on the same Postgres and Redis. It knows no keys, resolves nothing, keeps no order.
"""

import json
import os
import threading
import uuid
from types import SimpleNamespace

import psycopg2.pool
import redis
from flask import Flask, jsonify, request

TABLE = "CREATE TABLE bare (id uuid PRIMARY KEY, body text NOT NULL, at timestamptz NOT NULL DEFAULT clock_timestamp())"
LIST = "bare"


def make_application() -> Flask:
    """The route, with as many connections as the gateway may have."""
    app = Flask(__name__)
    most = 2 * int(os.environ.get("DATABASE_POOL_SIZE", "10"))  # all are made at once: this pool closes what it has beyond its least
    pool = psycopg2.pool.ThreadedConnectionPool(most, most, os.environ["DATABASE_URL"].replace("+psycopg2", ""))
    broker = redis.Redis(connection_pool=redis.BlockingConnectionPool.from_url(os.environ["BROKER_URL"], max_connections=most))
    unused = {"events": SimpleNamespace(close=lambda: None), "readiness": SimpleNamespace(start=lambda: None)}
    app.extensions["darkroom"] = SimpleNamespace(**unused)  # what that configuration starts and ends
    turn = threading.BoundedSemaphore(most)  # psycopg2's pool raises when it is empty; a server waits

    @app.post("/v1/jobs")
    def create():
        body, job_id = request.get_json(), str(uuid.uuid4())
        with turn:
            connection = pool.getconn()
            try:
                with connection, connection.cursor() as cursor:
                    cursor.execute("INSERT INTO bare (id, body) VALUES (%s, %s)", (job_id, json.dumps(body)))
            finally:
                pool.putconn(connection)
        broker.lpush(LIST, job_id)
        return jsonify(id=job_id), 202

    @app.get("/healthz")
    def health():
        return jsonify(status="ok")

    return app


if "DATABASE_URL" in os.environ and "BROKER_URL" in os.environ:
    application = make_application()
