"""Who is believed: signatures, their age, and more than one of them."""

import hmac
from hashlib import sha256

from kamiyo.conform import samples
from kamiyo.conform.check import check
from kamiyo.conform.target import Fault, Target, Unseen, told

# Nobody's secret.
_FOREIGN = "whsec_of_somebody_else"

_TEN_MINUTES = 600.0


@check(
    "signed event",
    "An event signed as Stripe signs it must be answered 2xx in time. Without that nothing else can be judged.",
)
async def signed_event(target: Target) -> str:
    """Deliver one event that nothing is wrong with."""
    sample = samples.customer()
    await target.accepts(sample)
    seen = await target.effect(sample)
    return "accepted, and processed" if seen else "accepted"


@check(
    "no signature",
    "Anyone can post to the address. What Stripe did not sign must be refused, and with a 4xx: a 5xx is a crash.",
)
async def no_signature(target: Target) -> str:
    """Deliver an event without the header."""
    await target.refuses(samples.customer())
    return "refused"


@check("foreign secret", "A signature that was made with another secret is a forgery.")
async def foreign_secret(target: Target) -> str:
    """Deliver an event that somebody else signed, with all that a good header has."""
    sample = samples.customer()
    await target.refuses(sample, target.signature(sample.body, secret=_FOREIGN))
    return "refused"


@check(
    "altered byte",
    "The signature covers every byte. A receiver that checks something else than what it then reads can be told lies.",
)
async def altered_byte(target: Target) -> str:
    """Sign an event, then change one letter of what it says."""
    sample = samples.customer()
    at = sample.body.index(b"@example.com") - 1
    altered = sample.body[:at] + bytes([sample.body[at] ^ 1]) + sample.body[at + 1 :]
    await target.refuses(sample, target.signature(sample.body), body=altered)
    return "refused"


@check(
    "old scheme only",
    "Only v1 counts. A receiver that takes another scheme can be talked down to a weaker one.",
)
async def old_scheme_only(target: Target) -> str:
    """Put a good signature under v0, where Stripe says to ignore it."""
    sample = samples.customer()
    await target.refuses(sample, target.signature(sample.body).replace("v1=", "v0="))
    return "refused"


@check(
    "old stamp",
    "Who records a delivery can send it again for ever, unless old ones are refused. Stripe's libraries draw "
    "the line at five minutes; a tighter one loses what a clock or a queue delays.",
)
async def old_stamp(target: Target) -> str:
    """Ten minutes old is too old; two are not."""
    stale, fine = samples.customer(), samples.customer()
    await target.refuses(stale, target.signature(stale.body, age=_TEN_MINUTES), what="signed ten minutes ago")
    await target.accepts(fine, target.signature(fine.body, age=120), what="signed two minutes ago")
    return "ten minutes old is refused, two are accepted"


@check(
    "future stamp",
    "A signature from the future is a wrong clock or a forged lifetime, and stays replayable for as long as "
    "it likes. Stripe's own library lets it through.",
)
async def future_stamp(target: Target) -> str:
    """Ten minutes ahead is too far."""
    sample = samples.customer()
    await target.refuses(sample, target.signature(sample.body, age=-_TEN_MINUTES), what="ten minutes ahead")
    return "refused"


@check(
    "two v1 signatures",
    "While a secret is rolled, for up to 24 hours, Stripe signs with both, and the receiver's may be either "
    "of the two.",
)
async def two_signatures(target: Target) -> str:
    """Put a good signature beside a foreign one: after it, before it."""
    for what, good_last in (("the good one second", True), ("the good one first", False)):
        sample = samples.customer()
        stamp, good = target.signature(sample.body).split(",")
        foreign = f"v1={hmac.digest(_FOREIGN.encode(), sample.body, sha256).hex()}"
        pair = [foreign, good] if good_last else [good, foreign]
        await target.accepts(sample, ",".join([stamp, *pair]), what=what)
    return "accepted, whichever comes first"


@check(
    "two header lines",
    "A proxy may split a header or add one. Whatever is made of it, it must be an answer, and no way around the check.",
)
async def two_header_lines(target: Target) -> str:
    """Send `Stripe-Signature` twice: a good line and a foreign one (anyone's choice); two foreign ones."""
    sample = samples.customer()
    forged = target.signature(sample.body, secret=_FOREIGN)
    answer = await target.post(sample.body, target.signature(sample.body), forged)
    if not answer.accepted and not answer.refused:
        raise Fault(f"a good and a foreign line: {told(answer)}")
    other = samples.customer()
    forged = target.signature(other.body, secret=_FOREIGN)
    await target.refuses(other, forged, forged, what="two foreign lines")
    return f"{'accepted' if answer.accepted else 'refused'} with a good line, refused without"


@check(
    "rolled secrets",
    "During a roll, and where live and test mode or several accounts share an address, each secret is good by itself.",
)
async def rolled_secrets(target: Target) -> str:
    """Sign with each of the receiver's secrets alone."""
    if len(target.secrets) < 2:
        raise Unseen("one secret was given; --secret again for each other that the receiver takes")
    for number, secret in enumerate(target.secrets, 1):
        sample = samples.customer()
        await target.accepts(sample, target.signature(sample.body, secret=secret), what=f"secret {number}")
    return "each is accepted"


CHECKS = (
    signed_event,
    no_signature,
    foreign_secret,
    altered_byte,
    old_scheme_only,
    old_stamp,
    future_stamp,
    two_signatures,
    two_header_lines,
    rolled_secrets,
)
