"""Properties may take their time: the machine that runs them also runs a stack."""

from hypothesis import settings

settings.register_profile("house", deadline=None)
settings.load_profile("house")
