"""API keys: shown once, stored as a digest, refused alike whatever is wrong with them."""

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import text

from models import api_keys
from models.api_keys import _check
from tests.builders import a_tenant

PEPPER = "a pepper of sixteen letters"


def issue(session, *, expires_at=None):
    return api_keys.issue(
        session,
        tenant_id=a_tenant(session).id,
        name="web app",
        pepper=PEPPER,
        expires_at=expires_at,
    )


def authenticate(session, key, pepper=PEPPER):
    """The key as a gateway finds it; None if it is refused."""
    kid = api_keys.kid_of(key)
    known = api_keys.look_up(session, [kid]).get(kid) if kid is not None else None
    return (
        known
        if known is not None and api_keys.verify_key(key, known.digest, pepper=pepper)
        else None
    )


def test_an_issued_key_opens_its_tenant_s_door(session):
    row, key = issue(session)

    assert authenticate(session, key).tenant_id == row.tenant_id


def test_the_digest_is_stored_and_the_key_is_not(session):
    _, key = issue(session)
    secret = key.split("_")[2]

    stored = session.scalars(text("SELECT api_keys::text FROM api_keys")).all()
    audited = session.scalars(
        text("SELECT facts::text FROM audit_log WHERE event = 'api-key:secret:issued'")
    ).all()

    assert not any(
        secret in row or secret[:-6] in row or secret.encode().hex() in row
        for row in [*stored, *audited]
    )


def test_a_key_is_worth_nothing_under_another_pepper(session):
    _, key = issue(session)

    assert authenticate(session, key, pepper="another pepper of many letters") is None


@pytest.mark.parametrize(
    "spoil",
    [
        lambda key: key[:-1] + ("0" if key[-1] != "0" else "1"),
        lambda key: key[:20] + ("0" if key[20] != "0" else "1") + key[21:],
        lambda key: key[:-6],
        lambda key: key.swapcase(),
        lambda key: "DR" + key[2:],
        lambda key: key + "0",
        lambda key: key.replace("_", ""),
        lambda key: "é" + key,
        lambda key: "",
        lambda key: "dr_",
        lambda key: signed("dr_unknownunkno_" + 43 * "0"),
        lambda key: signed("dr_a_b_c"),
        lambda key: signed("xx_unknownunkno_" + 43 * "0"),
        lambda key: signed("dr_\x00_" + 43 * "0"),
        lambda key: signed("dr_" + key.split("_")[1] + "_" + 43 * "0"),
    ],
    ids=lambda spoil: None,
)
def test_a_mistyped_or_invented_key_is_refused(session, spoil):
    _, key = issue(session)

    assert authenticate(session, spoil(key)) is None


def signed(body: str) -> str:
    """An invented key whose check characters are right."""
    return body + _check(body)


def test_a_revoked_key_is_refused(session):
    row, key = issue(session)

    api_keys.revoke(session, row.id)

    assert authenticate(session, key) is None
    assert api_keys.revoke(session, row.id) is None


def test_an_expired_key_is_refused(session):
    _, gone = issue(session, expires_at=datetime.now(UTC) - timedelta(seconds=1))
    _, live = issue(session, expires_at=datetime.now(UTC) + timedelta(hours=1))

    assert authenticate(session, gone) is None
    assert authenticate(session, live) is not None


def test_revoking_one_key_leaves_the_tenant_s_others(session):
    row, _ = issue(session)
    _, other = api_keys.issue(session, tenant_id=row.tenant_id, name="pipeline", pepper=PEPPER)

    api_keys.revoke(session, row.id)

    assert authenticate(session, other).tenant_id == row.tenant_id
    assert [key.name for key in api_keys.of_tenant(session, row.tenant_id)] == [
        "web app",
        "pipeline",
    ]


DAY_S = 86_400.0


@pytest.mark.parametrize(
    ("lives_for_s", "grace_s", "left_s"),
    [(None, DAY_S, DAY_S), (10, DAY_S, 10), (2 * DAY_S, DAY_S, DAY_S), (DAY_S, 0.0, 0.0)],
    ids=["without an end", "ends before the grace", "ends after the grace", "no grace"],
)
def test_rotation_never_prolongs_a_key(session, lives_for_s, grace_s, left_s):
    ends_at = None if lives_for_s is None else datetime.now(UTC) + timedelta(seconds=lives_for_s)
    row, _ = issue(session, expires_at=ends_at)

    new, _ = api_keys.rotate(session, row.id, pepper=PEPPER, grace_s=grace_s)

    left = "extract(epoch FROM expires_at - clock_timestamp())"
    query = text(f"SELECT {left} FROM api_keys WHERE id = :id")
    assert float(session.scalar(query, {"id": row.id})) == pytest.approx(left_s, abs=5)
    assert (new.name, new.scopes, new.expires_at) == (row.name, row.scopes, None)


def test_rotation_of_a_key_that_is_over_is_refused(session):
    revoked, _ = issue(session)
    api_keys.revoke(session, revoked.id)
    expired, _ = issue(session, expires_at=datetime.now(UTC) - timedelta(seconds=1))

    for row in (revoked, expired):
        assert api_keys.rotate(session, row.id, pepper=PEPPER, grace_s=DAY_S) is None
