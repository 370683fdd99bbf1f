"""The OpenAPI document: what answers look like (schemas), what can be asked (operations), and both put together (document)."""
