"""A job that is written is accepted.

Whatever fails after the commit, the client is told so, or it would ask for it again.
"""

import threading
from collections.abc import Iterator

import pytest
from sqlalchemy import create_engine, event, make_url, text
from sqlalchemy.orm import Session

from app import create_app
from models import api_keys, tenants, workers
from models.database import transaction
from policy.fleet import parse_fleet
from settings import REPO, GatewaySettings
from tests.app.conftest import bearer
from tests.builders import a_closed_port, settings_for
from tests.models.conftest import a_database

JOB = {"prompt": "a red circle", "tier": "batch", "steps": 4, "n": 2}


class House:
    """A gateway on a database of its own, with no broker.

    The database goes away with the commit that writes a job.
    """

    def __init__(self, env, database) -> None:
        self._server = create_engine(env["MIGRATION_DATABASE_URL"], isolation_level="AUTOCOMMIT")
        self._database, self._name = database, make_url(database.owner_url).database
        self._before = 0
        url = database.app.url.render_as_string(hide_password=False)
        settings = settings_for(
            GatewaySettings,
            env,
            database_url=url,
            broker_url=f"redis://127.0.0.1:{a_closed_port()}/0",
            lease_ttl_s=86_400.0,
        )
        self.app = create_app(settings, parse_fleet((REPO / "fleet.toml").read_text()))
        with transaction(database.app) as session:
            workers.heartbeat(
                session, name="gpu0@here", pool="local", device="cpu", slots=16, facts={}
            )
            tenant = tenants.create(session, name="tests", actor="tests")
            pepper = settings.api_key_pepper.get_secret_value()
            _, self._key = api_keys.issue(
                session, tenant_id=tenant.id, name="tests", pepper=pepper, actor="tests"
            )

    def jobs(self) -> list[str]:
        """All that were made by the last request."""
        with transaction(self._database.owner) as session:
            made = session.scalars(text("SELECT id FROM jobs ORDER BY id")).all()
            return [str(job_id) for job_id in made[self._before :]]

    def post(self, path, body, *, headers=None):
        """Send a request.

        The database is away from the moment at which a job of it is committed until it is answered.
        """

        is_away = threading.Event()
        client = threading.get_ident()  # a refresh in the background commits as well
        parts = self.app.extensions["darkroom"]
        for engine in (parts.database, parts.forecaster._database):
            engine.dispose()  # the request before this one cut off what they hold
        self._before += len(self.jobs())

        def go_away(session: Session) -> None:
            is_the_gateway_s = (
                threading.get_ident() == client
                and session.get_bind().url.database == self._name
                and session.get_bind() is not self._database.owner
            )
            if is_the_gateway_s and not is_away.is_set() and self.jobs():
                is_away.set()
                self._let_in(False)

        event.listen(Session, "after_commit", go_away)
        try:
            return self.app.test_client().post(
                path, json=body, headers=bearer(self._key) | (headers or {})
            )
        finally:
            event.remove(Session, "after_commit", go_away)
            self._let_in(True)
            assert is_away.is_set()

    def _let_in(self, is_open: bool) -> None:
        with self._server.connect() as connection:
            connection.execute(
                text(f"ALTER DATABASE {self._name} ALLOW_CONNECTIONS {str(is_open).lower()}")
            )
            if not is_open:
                self._database.owner.dispose()
                connection.execute(
                    text(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                        "WHERE datname = :name"
                    ),
                    {"name": self._name},
                )

    def close(self) -> None:
        self._server.dispose()


@pytest.fixture(scope="module")
def house(stack, closing) -> Iterator[House]:
    with a_database(stack.env) as database:
        house = House(stack.env, database)
        yield house
        closing(house.app.extensions["darkroom"])
        house.close()


@pytest.mark.parametrize("headers", [{}, {"Prefer": "wait=2"}], ids=["at once", "waiting"])
def test_a_job_is_accepted_though_the_database_goes_away_with_its_commit(house, headers):
    answer = house.post("/v1/jobs", JOB, headers=headers)

    assert answer.status_code == 202, answer.json
    assert (answer.json["state"], [answer.json["id"]]) == ("queued", house.jobs())


def test_a_batch_is_accepted_though_the_database_goes_away_with_its_commit(house):
    answer = house.post(
        "/v1/jobs:batch", {"defaults": JOB, "jobs": [{"seed": 1}, {"seed": 2}, {"steps": -1}]}
    )

    assert answer.status_code == 200, answer.json
    assert (answer.json["accepted"], answer.json["refused"]) == (2, 1)
    told = [item["job"] for item in answer.json["data"][:2]]
    assert [job["id"] for job in told] == house.jobs()
    assert [(job["state"], job["seed"], job["n"], job["model"]) for job in told] == [
        ("queued", 1, 2, "pocket"),
        ("queued", 2, 2, "pocket"),
    ]
