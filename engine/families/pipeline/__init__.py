"""Any diffusers pipeline as it is: its own `__call__` runs as a coroutine, advanced step by step.

Two families. Both run the call on a shallow copy of the pipeline with schedulers of the image's
own:

    batched.Pipeline      stand-ins take the denoisers' places in the copy and hand every call to
                          the engine, which makes the calls of strangers as one. The first use of
                          the VAE after that is the end of denoising; `decode` runs the rest.
    plain.PlainPipeline   nothing is taken apart: the call runs alone, in turns of one scheduler
                          step. The last resort, for who breaks above.

A call that is not known to keep its rows apart (see `calls.py`) is made alone. That goes for
pipelines that pass a key-value cache or other objects into the denoiser, and for calls of a kind
that the trial run at the checkpoint's load did not show. Not served at all: cascades of several
pipelines, and pipelines that do not give one picture.

An image goes on elsewhere by replay: the answers its call has got are kept, and given again to a
call begun anew.

    folder.py      which parts a checkpoint folder holds, and how they become a pipeline
    signature.py   what the pipeline's call takes of a request
    running.py     one image's call on its way
    trial.py       calls made at load, to find out what no signature says
    called.py      what both families have in common
"""
