"""Decisions without I/O: tiers, catalog, queues, admission, cost. No clock but the one it is handed."""
