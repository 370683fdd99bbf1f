"""Run the fleet: the one-machine stack, the GPU launcher, the worker's Celery consumer."""
