"""Who is signed in: a signed cookie, and a token that every action must bring.

The server remembers nothing. The cookie holds a random number and the time, signed with a key made from the admin key:
whoever changes the admin key ends every session at once. It cannot be used to find the admin key out either, for each
guess costs a run of scrypt.
"""

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from functools import cached_property, lru_cache

from itsdangerous import BadSignature, TimestampSigner
from starlette.requests import Request
from starlette.responses import Response

#: How long a session lasts, from signing in: one shift.
SESSION_SECONDS = 12 * 3600

COOKIE = "kamiyo_session"


@dataclass(frozen=True, slots=True)
class Session:
    """One signed-in browser. `token` must come with every action; nobody but its own pages knows it."""

    token: str

    def allows(self, token: str) -> bool:
        """Whether an action that brings `token` comes from one of this session's own pages."""
        return hmac.compare_digest(self.token.encode(), token.encode("utf-8", "replace"))


@lru_cache(maxsize=4)
def _made_of(key: str) -> bytes:
    # RFC 7914; 16 MiB and some 50 ms, once in the life of a process, however many applications it makes.
    return hashlib.scrypt(key.encode(), salt=b"kamiyo dashboard session", n=2**14, r=8, p=1)


@dataclass
class Sessions:
    """Begins, reads and ends sessions under one admin key."""

    key: str

    @cached_property
    def _secret(self) -> bytes:
        return _made_of(self.key)

    @cached_property
    def _signer(self) -> TimestampSigner:
        return TimestampSigner(
            self._secret, salt="kamiyo.dashboard", key_derivation="hmac", digest_method=hashlib.sha256
        )

    def begin(self, response: Response, *, path: str, secure: bool) -> None:
        """Sign in: set the cookie, for `path` and what is below it."""
        response.set_cookie(
            COOKIE,
            self._signer.sign(secrets.token_urlsafe(24)).decode(),
            max_age=SESSION_SECONDS,
            path=path,
            secure=secure,
            httponly=True,
            samesite="strict",
        )

    def end(self, response: Response, *, path: str, secure: bool) -> None:
        """Sign out: take the cookie back."""
        response.delete_cookie(COOKIE, path=path, secure=secure, httponly=True, samesite="strict")

    def of(self, request: Request) -> Session | None:
        """The session this request belongs to; None where there is none, or none any more."""
        try:
            name = self._signer.unsign(request.cookies.get(COOKIE, ""), max_age=SESSION_SECONDS)
        except BadSignature:  # SignatureExpired is one
            return None
        return Session(hmac.new(self._secret, b"action " + name, hashlib.sha256).hexdigest())
