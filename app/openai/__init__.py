"""Serve OpenAI's images interface with the same services as the gateway's own routes."""
