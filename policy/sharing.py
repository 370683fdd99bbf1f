"""Share a scarce resource between tenants of unknown number.

Such as waiting threads, event streams, memory for uploads.
"""

# A tenant never holds more than three times what is left free: one tenant gets three quarters, two
# get three sevenths each.
RESERVE = 3


def may_take(amount: int, *, held: int, in_use: int, most: int) -> bool:
    """Tell whether a tenant that holds `held` may take `amount` more.

    in_use, most: what all tenants together hold, and what there is.  A tenant that holds nothing
    needs only that there is enough. Beyond that the limit shrinks as others come, and some is
    always left for the next one; the number of tenants need not be known.
    """
    left = most - in_use - amount
    return left >= 0 and (held == 0 or held + amount <= RESERVE * left)
