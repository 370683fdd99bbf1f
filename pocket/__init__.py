"""A tiny image model in the ordinary Stable Diffusion format, small enough for the repository.

`world` defines what it can be asked for, `train` makes it, `checker` tells whether a picture shows
what was asked, and `evaluate` measures it. Nothing is imported here, so `pocket.checker` stays free
of torch.
"""
