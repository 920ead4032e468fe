"""For all tests."""

from hypothesis import settings

# A test's duration says something about the machine, not about the code.
settings.register_profile("eadt", deadline=None)
settings.load_profile("eadt")
