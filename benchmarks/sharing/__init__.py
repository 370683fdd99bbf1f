"""How work shares one worker: what `benchmarks.tiers`, `tenants` and `bursts` have in common.

`house.py` starts a house of its own and makes tenants; `door.py` asks it for images as a tenant would, patient when refused. `ledger.py`
reads what happened from Postgres, `meter.py` what the device did from the worker's metrics: both by the servers' clocks, for client
threads on the same cores would blur every latency they took themselves. `arrivals.py` says who asks when, `feeding.py` keeps work waiting,
`verdict.py` judges. `plain_celery.py` is the stock Celery setup that the tiers are compared with; `plain_worker.py` is its process.
"""
