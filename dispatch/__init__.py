"""Who goes next: rows, the rule of `policy`, and the broker; for the gateway, the tasks and the sweeper."""
