"""Put a whole fleet under load, break it on purpose, and see what its rows say afterwards (`benchmarks/chaos.py`, `benchmarks/rolling.py`).

rig          the running stack, and every way to look into it
fleetfile    a fleet.toml for the occasion; tinycheckpoint: a model that costs next to nothing
workload     what is asked for, by seed
customers    tenants who ask over REST and do not lose count when nobody answers
faults       what is done to the stack, when, and who undoes it
outages      parts that answer with errors for a while, and how that is brought about; refusals: the proxy that says what a Redis may say
ledger       what became of the jobs, read from the rows
checks       what must hold in the end
figures      what it cost: latency, steps, recovery times
report       how it is told

Judging happens on rows and objects alone, after the dust has settled: no process of the house is asked for its opinion.
"""
