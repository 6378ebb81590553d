"""simsr: a storage repository in user space. See docs/design.md for the house."""

__version__ = "0.1.0"
