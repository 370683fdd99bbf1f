"""Prompts in, pixels out, batched continuously at denoise-step level.

Start reading at `engine.py` (what callers see) and `loop.py` (what the device thread does). The
four nouns are `request.py` (what is asked for), `inflight.py` (its progress), `scheduler.py` (which
images advance next) and `runner.py` (the tensors). This room knows torch and diffusers. It has
never heard of HTTP, queues, tables or the environment. Nothing is imported here, so that
`engine.request` and `engine.scheduler` stay usable without torch.
"""
