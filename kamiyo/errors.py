"""Every error Kamiyo raises, as one tree.

    KamiyoError
    ├── SettingsError            a setting is wrong: the start stops and the sentence names it
    ├── MigrationNeeded          the database lacks a migration and may not be changed by itself
    ├── ForeignTables            the database has tables of these names that are not Kamiyo's
    ├── RoleRefused              PostgreSQL does not let this role do what Kamiyo must
    ├── ReceiveError             a delivery is refused; carries the HTTP answer
    │   ├── SignatureError       400 · nothing proves that Stripe sent it
    │   ├── RoadKeyInvalid       401 · another road's key is absent or wrong
    │   ├── PayloadError         400 · Stripe signed it, but it is not an event
    │   ├── BodyTooLarge         413 · longer than the limit
    │   ├── BodyTooSlow          408 · it trickles
    │   └── Unavailable          503 · not committed, so Stripe must deliver again
    │       ├── SecretMissing    no signing secret is configured
    │       ├── RoadClosed       no key is configured for this road
    │       ├── Overloaded       more is waiting than can be committed soon
    │       ├── TooMuchArriving  more of half-received bodies is held than there is memory for
    │       └── DatabaseUnavailable   PostgreSQL cannot be had
    └── AdminError               an operator's call is refused; carries the HTTP answer
        ├── AdminKeyInvalid      401
        ├── AdminKeyMissing      503 · no key is configured, so the door stays shut
        ├── EventUnknown         404
        └── EventNotFailed       409

A user's handler speaks with two more, which are values rather than errors: see `kamiyo.handlers.Retry`
and `kamiyo.handlers.Bury`.
"""

from typing import ClassVar


class KamiyoError(Exception):
    """The root: catch this to catch everything Kamiyo raises on purpose."""


class SettingsError(KamiyoError):
    """A setting has a value that cannot work; the message names the variable and what it takes."""


class MigrationNeeded(KamiyoError):
    """The database is behind this version and `KAMIYO_AUTO_MIGRATE` is off; the message says what to run."""


class ForeignTables(KamiyoError):
    """The database holds tables with Kamiyo's names that Kamiyo did not make; nothing was changed."""


class RoleRefused(KamiyoError):
    """PostgreSQL does not let the role of DATABASE_URL do what Kamiyo must; nothing was changed."""


class _Answer(KamiyoError):
    """An error that is also an HTTP answer: `status`, and `detail` as the client reads it."""

    status: ClassVar[int] = 500
    detail: ClassVar[str] = "Internal error"
    retry_after: ClassVar[int | None] = None

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or self.detail)


class ReceiveError(_Answer):
    """A delivery is refused."""


class SignatureError(ReceiveError):
    """Nothing proves that Stripe sent this body.

    `reason` is for the log and the metric only, so that a forger learns nothing from the answer. One of
    `missing`, `malformed`, `no_match`, `too_old`, `too_new`.
    """

    status = 400
    detail = "Invalid signature"

    def __init__(self, reason: str) -> None:
        super().__init__(f"Invalid signature: {reason}")
        self.reason = reason


class SignatureMissing(SignatureError):
    """The request has no `Stripe-Signature` header."""

    detail = "Missing Stripe signature header"

    def __init__(self) -> None:
        super().__init__("missing")


class RoadKeyInvalid(ReceiveError):
    """The `X-Api-Key` header of a delivery by EventBridge or Event Grid is absent or wrong."""

    status = 401
    detail = "Invalid API key"


class PayloadError(ReceiveError):
    """It is proved who sent it, but the body is not a Stripe event."""

    status = 400
    detail = "Invalid payload"


class BodyTooLarge(ReceiveError):
    """The body is longer than `KAMIYO_MAX_BODY_BYTES`; the rest of it was not read."""

    status = 413
    detail = "Payload too large"


class BodyTooSlow(ReceiveError):
    """The body did not arrive in time; the connection is closed."""

    status = 408
    detail = "Request body came too slowly"


class Unavailable(ReceiveError):
    """The event is not committed; a sender that retries (Stripe does) loses nothing."""

    status = 503
    detail = "Service unavailable"
    retry_after = 5


class SecretMissing(Unavailable):
    """No signing secret is configured, so nothing can be verified and nothing is accepted."""

    detail = "Webhook secret not configured"
    retry_after = 60


class RoadClosed(Unavailable):
    """No key is configured for this road, so nothing is accepted by it."""

    detail = "API key not configured"
    retry_after = 60


class Overloaded(Unavailable):
    """More deliveries are waiting for their commit than will get it in good time."""

    detail = "Too many events are waiting to be stored"
    retry_after = 2


class TooMuchArriving(Unavailable):
    """More bytes of half-received bodies are held than a server has memory for: many slow senders at once."""

    detail = "Too many bodies are arriving at once"
    retry_after = 2


class DatabaseUnavailable(Unavailable):
    """PostgreSQL cannot be reached, or did not commit."""

    detail = "Database unavailable"


class AdminError(_Answer):
    """An operator's call is refused."""


class AdminKeyInvalid(AdminError):
    """The `X-Admin-Key` header is absent or wrong."""

    status = 401
    detail = "Invalid admin API key"


class AdminKeyMissing(AdminError):
    """No `ADMIN_API_KEY` is configured: the door stays shut rather than open."""

    status = 503
    detail = "Admin API key not configured"


class EventUnknown(AdminError):
    """No event has this id."""

    status = 404
    detail = "Event not found"


class EventNotFailed(AdminError):
    """Only a failed event can be retried; this one is pending, being processed, or processed."""

    status = 409
    detail = "Event is not failed"
