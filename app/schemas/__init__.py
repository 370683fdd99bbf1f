"""Say what the gateway answers and is asked: JSON and the OpenAPI document are made of this.

A document that views build is a dataclass made by `document`: a member too many, or one too few,
is a TypeError where it is built. What is JSON already (warnings and adapters of a row), what has
members that come and go (problems), and what no code builds (OpenAI's request bodies) are
TypedDicts. Descriptions are written for users of the API.
"""
