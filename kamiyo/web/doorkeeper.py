"""Who may come in as an operator, and how guessing is made slow."""

import asyncio
import hmac
import time
from collections import OrderedDict
from dataclasses import dataclass, field

from kamiyo.errors import AdminKeyInvalid, AdminKeyMissing
from kamiyo.telemetry import happened

_LONGEST_WAIT_SECONDS = 5.0
_FORGET_AFTER_SECONDS = 900.0
# Addresses remembered at once; the longest quiet one makes room, so that a crowd of addresses cannot fill memory.
_MOST_ADDRESSES = 10_000


@dataclass
class _Misses:
    count: int = 0
    last: float = 0.0


@dataclass
class Doorkeeper:
    """Compares admin keys in constant time. A wrong one is answered later each time, for each address by itself.

    The right key is never slowed down: behind a proxy everybody shares one address, and nobody must be able to lock
    the operators out.
    """

    key: str
    _misses: OrderedDict[str, _Misses] = field(default_factory=OrderedDict)

    async def admit(self, given: str | None, address: str) -> None:
        """Return when `given` is the key. Raises AdminKeyMissing while none is set, AdminKeyInvalid otherwise."""
        if not self.key:
            raise AdminKeyMissing
        if given is not None and self._fits(given):
            return
        if given is not None:
            await asyncio.sleep(self._penalty(address))
            happened("admin_refused", address=address)
        raise AdminKeyInvalid

    def _fits(self, given: str) -> bool:
        # From a form it comes as it was typed; from a header as the bytes of UTF-8, read as Latin-1.
        key = self.key.encode()
        typed = hmac.compare_digest(key, given.encode("utf-8", "replace"))
        return hmac.compare_digest(key, given.encode("latin-1", "replace")) or typed

    def _penalty(self, address: str) -> float:
        now = time.monotonic()
        misses = self._misses.pop(address, _Misses())
        if now - misses.last > _FORGET_AFTER_SECONDS:
            misses.count = 0
        # Counted before the wait: guessing in parallel does not make it faster.
        misses.count, misses.last = misses.count + 1, now
        self._misses[address] = misses
        while len(self._misses) > _MOST_ADDRESSES:
            self._misses.popitem(last=False)
        # The first slip costs nothing worth noticing; the tenth five seconds.
        return float(min(0.01 * 2 ** (misses.count - 1), _LONGEST_WAIT_SECONDS))
