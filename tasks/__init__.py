"""One function per promise: render, store, deliver, sweep; `roles/` makes processes of them."""
