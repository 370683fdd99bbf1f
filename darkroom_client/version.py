"""Name the version of this package, which is that of the release it comes with."""

VERSION = "0.1.0"
