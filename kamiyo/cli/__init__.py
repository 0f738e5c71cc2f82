"""`kamiyo`: run it, feed it, look into it."""

from kamiyo.cli.main import main

__all__ = ["main"]
