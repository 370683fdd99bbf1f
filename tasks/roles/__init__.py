"""Put each kind of process together, one module per role.

`build(settings, fleet)` makes a role's parts and starts nothing that takes work; tests and
benchmarks use it, too. `serve(settings, fleet)` builds and works until told to end.
"""
