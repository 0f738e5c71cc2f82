"""The benchmark: Kamiyo beside what else receives Stripe's webhooks, on one machine, in one run.

    python -m bench.run       peers and floors, interleaved; see `docs/performance.md`
    python -m bench.growth    ten million events against an empty database

This package is imported by peers in environments of their own, so nothing is imported here.
"""
