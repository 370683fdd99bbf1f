"""How much of something scarce a tenant may hold."""

import pytest

from policy.sharing import may_take


def taken(most, tenants, amount=1):
    """What each of so many tenants holds once none of them gets any more; they ask in turns."""
    held = [0] * tenants
    while True:
        before = list(held)
        for tenant in range(tenants):
            if may_take(amount, held=held[tenant], in_use=sum(held), most=most):
                held[tenant] += amount
        if held == before:
            return held


@pytest.mark.parametrize(("tenants", "each"), [(1, 48), (2, 27), (3, 19)])
def test_the_share_of_each_shrinks_as_others_come(tenants, each):
    assert all(abs(held - each) <= 1 for held in taken(64, tenants))


@pytest.mark.parametrize("most", [8, 64, 512])
def test_something_is_left_for_who_comes_next(most):
    for tenants in range(1, most // 8 + 1):
        held = taken(most, tenants)

        assert may_take(1, held=0, in_use=sum(held), most=most)


def test_whoever_holds_nothing_may_have_the_last():
    assert may_take(1, held=0, in_use=7, most=8)
    assert may_take(8, held=0, in_use=0, most=8)
    assert not may_take(1, held=0, in_use=8, most=8)


def test_nobody_gets_more_than_there_is():
    assert not may_take(9, held=0, in_use=0, most=8)
    assert sum(taken(8, 20)) == 8


def test_large_pieces_leave_room_too():
    assert taken(200, 1, amount=32) == [128]
