"""Do the work behind the API: render, store, deliver, sweep. `roles/` makes processes of it."""
