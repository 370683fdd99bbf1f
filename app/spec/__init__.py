"""Describe every operation of the API with its parameters, as one OpenAPI document."""
