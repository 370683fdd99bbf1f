"""How much of something scarce one tenant may hold while others may come: threads that wait, event streams, room for uploads."""

# A tenant's holdings never exceed three times what is left free: alone it gets three quarters, two
# get three sevenths each.
RESERVE = 3


def may_take(amount: int, *, held: int, in_use: int, most: int) -> bool:
    """Whether a tenant that holds `held` may have `amount` more when `in_use` of `most` are taken, by everybody together.

    Whoever holds nothing needs only that there is enough. Beyond that the limit shrinks as others come, and some is always left for
    the next one; nobody has to say how many tenants there are.
    """
    left = most - in_use - amount
    return left >= 0 and (held == 0 or held + amount <= RESERVE * left)
