"""Implement what the API does, for every route and interface.

Services take a runtime and a caller, and know nothing of the HTTP request.
"""
