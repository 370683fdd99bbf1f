"""Serve HTTP: a blueprint per resource parses the request, calls a service, and answers in JSON."""
