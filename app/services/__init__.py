"""Use cases: what the API does, whoever asks and however. They take a runtime and a caller, and know no request."""
