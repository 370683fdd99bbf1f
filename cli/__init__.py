"""The `darkroom` command: the HTTP API and the SQL of an installation, and the stack of this machine, from a terminal."""
