"""Intramural: fine-tune a language model together; every record stays within its own walls."""

from importlib.metadata import version

__all__ = ["__version__"]
__version__ = version("intramural")
