"""Release waiting jobs, for the gateway, the tasks and the sweeper.

This room joins the rows, the rule in `policy`, and the broker.
"""
