"""Stripe's signature scheme, both directions, so that the simulator and the verifier cannot drift apart.

`Stripe-Signature: t=<unix seconds>,v1=<hex>[,v1=<hex>…][,v0=…]`, where each `v1` is HMAC-SHA256 over
`"{t}.{raw body}"` with the whole `whsec_…` string as the key. While a secret is being rolled there are two.
Source: Stripe's documentation, "Verify webhook signatures manually"; oracle in the tests:
`stripe.WebhookSignature.verify_header`.
"""

import hmac
from collections.abc import Sequence
from hashlib import sha256

from kamiyo.errors import SignatureError, SignatureMissing

#: Seconds a signature stays good, either way. Stripe's libraries use five minutes; zero would switch replay
#: protection off, so it is not accepted as a setting.
TOLERANCE_SECONDS = 300

# A unix time has ten digits until the year 2286. The bound keeps int() away from megabytes of digits.
_LONGEST_TIMESTAMP = 12
# Stripe sends one v1 per active secret. A bound keeps a long header from costing more than a long body.
_MOST_SIGNATURES = 16


def sign(body: bytes, secret: str, timestamp: int) -> str:
    """The `Stripe-Signature` header value Stripe would send for `body` at `timestamp` (unix seconds)."""
    return f"t={timestamp},v1={_hmac(body, secret.encode(), str(timestamp).encode()).decode()}"


def verify(
    body: bytes,
    header: str | bytes | None,
    secrets: Sequence[str],
    now: float,
    tolerance: int = TOLERANCE_SECONDS,
) -> int:
    """Check that one of `secrets` signed exactly these bytes, recently; return which one (its index).

    `header` is the header's value as it arrived, `now` the unix time to judge its age by, in seconds.

    Raises SignatureMissing without a header, SignatureError otherwise, with the reason `malformed`, `no_match`,
    `too_old` or `too_new`. The age is judged after the signature, so that `too_old` always speaks of something
    Stripe really signed: a clock that is off, or a replay.
    """
    if not header:
        raise SignatureMissing
    raw = header.encode("latin-1", "replace") if isinstance(header, str) else header
    timestamp, signatures = _parse(raw)
    which = _signer(body, secrets, timestamp, signatures)
    age = now - int(timestamp)
    if age > tolerance:
        raise SignatureError("too_old")
    # Stripe's own library lets a signature from the future through. A time stamp nobody can have made yet is
    # a wrong clock or a forged lifetime, and would stay replayable for as long as it likes.
    if age < -tolerance:
        raise SignatureError("too_new")
    return which


def _signer(body: bytes, secrets: Sequence[str], timestamp: bytes, signatures: Sequence[bytes]) -> int:
    for which, secret in enumerate(secrets):
        expected = _hmac(body, secret.encode(), timestamp)
        # A list, not a generator: every signature is compared, so that the time says nothing of which one fits.
        if any([hmac.compare_digest(expected, given) for given in signatures]):
            return which
    raise SignatureError("no_match")


def _hmac(body: bytes, secret: bytes, timestamp: bytes) -> bytes:
    # One-shot digest() over the joined bytes is the fastest road in CPython: OpenSSL in one call.
    return hmac.digest(secret, timestamp + b"." + body, sha256).hex().encode()


def _parse(header: bytes) -> tuple[bytes, list[bytes]]:
    timestamp: bytes | None = None
    signatures: list[bytes] = []
    for part in header.split(b",", _MOST_SIGNATURES * 2):
        key, _, value = part.strip().partition(b"=")
        # Were there two, Stripe's library would take the first as well.
        if key == b"t" and timestamp is None:
            timestamp = value
        elif key == b"v1" and len(signatures) < _MOST_SIGNATURES:
            signatures.append(value)
    if not timestamp or not timestamp.isdigit() or len(timestamp) > _LONGEST_TIMESTAMP or not signatures:
        raise SignatureError("malformed")
    return timestamp, signatures
