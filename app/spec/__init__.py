"""Describe the interface: what can be asked (operations), with what parameters, and all of it as one OpenAPI document."""
