"""Running the house: the one-machine stack, the GPU launcher, the worker's consumer."""
