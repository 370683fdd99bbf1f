"""Name the version of this release. No other file is where it comes from.

Places that cannot import it repeat it; tests/test_version.py compares them.
"""

VERSION = "0.1.0"
