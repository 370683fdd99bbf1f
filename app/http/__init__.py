"""HTTP in, JSON out: a blueprint per resource parses, calls a use case, and answers."""
