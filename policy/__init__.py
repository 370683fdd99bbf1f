"""Decisions without I/O: catalog, queues, release, admission, steps, cost, failures. No clock but the one it is handed."""
