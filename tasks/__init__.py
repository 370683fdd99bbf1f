"""One function per promise: render, store, deliver, sweep. `roles/` puts them together, a process each."""
