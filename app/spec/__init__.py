"""Describe what can be asked, with what parameters, and all of it as one OpenAPI document."""
