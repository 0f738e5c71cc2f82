"""The documents, and what generates the reference: `python -m docs.generate`."""
