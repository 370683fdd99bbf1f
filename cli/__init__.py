"""Provide the `darkroom` command.

It reaches an installation's HTTP API and SQL, and runs the stack of this machine, from a terminal.
"""
