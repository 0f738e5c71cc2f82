"""Who is measured: a module or a folder each. `base.py` says what a peer is."""
