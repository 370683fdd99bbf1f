"""What benchmarks have in common; each benchmark is a package beside this one.

stack             start a stack in a temporary folder and stop it; fleet_file: its fleet.toml;
                  tiny_checkpoint: a model that costs next to nothing
measured_stack    a stack with tenants, and what happened on it: job_queries reads Postgres,
                  worker_metrics the worker's /metrics. Both go by the servers' clocks: client
                  threads on the same cores would blur every latency they took themselves
load              who asks for what, and when; tenant_client: the API as one tenant calls it;
                  background_load: keeps tiers full while something else is measured
pipeline          plain diffusers, to compare with
refusals          a proxy that answers like a Redis in trouble
queue             acts on the job queue, timed in two databases
integrity         is any job lost or doubled? A workload, its records, and checks of them
statistics        percentile, growth, fairness
verdict           figures against targets: the last line of a benchmark and its exit status
tables, progress  what is printed meanwhile
"""
