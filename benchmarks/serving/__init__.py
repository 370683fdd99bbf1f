"""The serving comparison of `benchmarks.engine`: one traffic, four ways to serve it with the same model on one torch thread.

`traffic.py` says who asks when, `pipeline.py` is plain diffusers, `systems.py` the four ways, `comparison.py` the rounds and the
arithmetic. `litserve_server.py` runs in a process of its own.
"""

MAX_BATCH, WINDOW_S = 8, 0.05  # of those who collect requests for a while and then run them whole
