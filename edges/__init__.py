"""Talk to the outside world, one module each: object store, hand-off, progress, broker, telemetry.

Knows models; never Flask or torch.
"""
