"""Decide without I/O: catalog, queues, release, admission, steps, cost, failures.

No clock but the one that is handed in.
"""
