"""A tiny image model in the ordinary Stable Diffusion format, small enough to live in the repository.

`world` says what it can be asked for, `train` makes it, `checker` tells whether a picture is what was asked,
`evaluate` measures it. Nothing is imported here, so `pocket.checker` stays free of torch.
"""
