"""Package: the version that is installed here."""

from importlib.metadata import version

VERSION = version("intramural")
"""Read once: to read it takes milliseconds, and a simulation's sites all tell it."""
