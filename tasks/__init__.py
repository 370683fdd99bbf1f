"""One Celery function per promise: render, store, sweep. Each role of a process includes only its own."""
