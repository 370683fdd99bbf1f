"""Hold the tables, states, transitions and audit events.

This room knows SQLAlchemy, and of the other rooms only policy's plain values.

Callers commit; transitions never do. Every transition appends its audit event as its last
statement, so that the chain's lock is held as briefly as possible.

The order of locks. A transaction that locks more than one row takes the locks in this order, so
that no two transactions deadlock; tests/app/test_lock_order.py races every pair of the API's
operations.

1. A tenant's advisory lock (`usage.lock`), then its row in `idempotency_keys`.
2. `tenants`, then `api_keys`.
3. `jobs`, several of them by ascending id; after a job its `attempts`, `images` and `artifacts`.
   The advisory lock of a release comes before the jobs that it stamps where it is waited for; where
   a job is accepted it is only tried.
4. `files`, by ascending id, then `stored_files`, then `uploads`, by ascending key.
5. `flows`, by pool and tier, then `usage_ledger`.
6. `webhook_endpoints`, then their secrets and deliveries.
7. The head of the tenant's audit chain. After it nothing is waited for but `fair_clocks`, which the
   lock of a release guards.

A foreign key takes KEY SHARE on the row that it names, after the triggers of its own statement:
too late for this order. So a change to a row that others name locks it FOR NO KEY UPDATE, which
lets KEY SHARE pass (`key_share=True`). FOR UPDATE is for jobs and files alone: erasing one must see
what a concurrent transaction names. A transaction that names a job or a file takes KEY SHARE on it
at the job's or file's place in the order.
"""
