"""The least that a route can do which must not lose a request, in plain Flask.

One durable INSERT and one LPUSH. Served by the gateway's own gunicorn configuration, on the same
Postgres and Redis. It knows no keys, resolves nothing, keeps no order.
"""

import json
import os
import threading
import uuid
from types import SimpleNamespace

import psycopg2.pool
import redis
from flask import Flask, Response, jsonify, request

TABLE = """
CREATE TABLE bare (
    id uuid PRIMARY KEY, body text NOT NULL, at timestamptz NOT NULL DEFAULT clock_timestamp()
)
"""
INSERT = "INSERT INTO bare (id, body) VALUES (%s, %s)"
LIST = "bare"


def make_application() -> Flask:
    """Make the route, with as many connections as the gateway may have."""
    app = Flask(__name__)
    # All are made at once: this pool closes what it has beyond its least.
    most = 2 * int(os.environ.get("DATABASE_POOL_SIZE", "10"))
    database_url = os.environ["DATABASE_URL"].replace("+psycopg2", "")
    pool = psycopg2.pool.ThreadedConnectionPool(most, most, database_url)
    broker = redis.Redis(
        connection_pool=redis.BlockingConnectionPool.from_url(
            os.environ["BROKER_URL"], max_connections=most
        )
    )
    app.extensions["darkroom"] = SimpleNamespace(  # what that configuration starts and ends
        events=SimpleNamespace(close=lambda: None),
        readiness=SimpleNamespace(start=lambda: None),
    )
    turn = threading.BoundedSemaphore(
        most
    )  # psycopg2's pool raises when it is empty; a server waits

    @app.post("/v1/jobs")
    def create() -> tuple[Response, int]:
        body = request.get_json()
        job_id = str(uuid.uuid4())
        with turn:
            connection = pool.getconn()
            try:
                with connection, connection.cursor() as cursor:
                    cursor.execute(INSERT, (job_id, json.dumps(body)))
            finally:
                pool.putconn(connection)
        broker.lpush(LIST, job_id)
        return jsonify(id=job_id), 202

    @app.get("/healthz")
    def health() -> Response:
        return jsonify(status="ok")

    return app


if "DATABASE_URL" in os.environ and "BROKER_URL" in os.environ:
    application = make_application()
