"""Tables, states, transitions and audit events. Knows SQLAlchemy and nobody else in the house.

Callers commit; transitions never do. Every transition appends its audit event as its last statement, so that the
chain's lock is held for as short as can be.
"""
