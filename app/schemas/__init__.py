"""Define requests and answers of the gateway; JSON and the OpenAPI document are made of them.

A document that views build is a dataclass made by `document`: a missing or an unknown member is a
TypeError where it is built. TypedDicts are used for what is JSON already (warnings and adapters of
a row), for what has optional members (problems), and for what no code builds (OpenAI's request
bodies). Descriptions are written for users of the API.
"""
