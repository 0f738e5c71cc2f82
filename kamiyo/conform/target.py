"""The receiver under test: how to deliver to it, what to expect of it, where to look behind its answers."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from kamiyo.conform.observe import EventSeen, EventView, ObjectView, ViewFailed
from kamiyo.conform.samples import Sample
from kamiyo.conform.wire import Address, Answer, connected, head
from kamiyo.signature import sign

# Seconds between two looks at a view.
_LOOK_EVERY = 0.02

# Seconds before an event that was not accepted the second time is delivered a third time.
_FIRST_PAUSE = 0.1

#: What a check says that would have to look behind the answers, and cannot.
NOTHING_TO_OBSERVE = "nothing to observe behind the answers"


class Fault(Exception):
    """The receiver did what it must not; the text says what."""


class Unseen(Exception):
    """Nothing wrong was seen, and it could not be looked at closely enough to say more; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A receiver, by its address and the secrets it accepts.

    `timeout` is how many seconds it has to answer, or to finish what it has acknowledged; `trickle_seconds`
    how long a slow body is made to take.
    """

    address: Address
    secrets: tuple[str, ...]
    timeout: float = 10.0
    trickle_seconds: float = 3.0
    events: EventView | None = None
    objects: ObjectView | None = None

    def signature(self, body: bytes, *, age: float = 0, secret: str | None = None) -> str:
        """The header Stripe would send with `body`, made `age` seconds ago (by the first secret)."""
        return sign(body, secret or self.secrets[0], int(time.time() - age))

    # ── Delivering ──────────────────────────────────────────────────────────────────────────────────────────

    async def post(self, body: bytes, *signatures: str) -> Answer:
        """Deliver `body` under these signature lines, one connection for itself, and give what came back."""
        [answer] = await self.post_together([(body, signatures)])
        return answer

    async def post_together(self, deliveries: Sequence[tuple[bytes, Sequence[str]]]) -> list[Answer]:
        """Deliver all of them at the same moment, each on a connection of its own."""
        async with AsyncExitStack() as stack:
            wires = [await stack.enter_async_context(connected(self.address, self.timeout)) for _ in deliveries]
            for wire, (body, signatures) in zip(wires, deliveries, strict=True):
                await wire.send(head(self.address, signatures, len(body)) + body[:-1])
            # Everything but one byte has arrived everywhere: now they are complete within microseconds.
            for wire, (body, _) in zip(wires, deliveries, strict=True):
                await wire.send(body[-1:])
            return await asyncio.gather(*(wire.answer(self.timeout) for wire in wires))

    async def abandon(self, sample: Sample, share: float = 1.0) -> None:
        """Deliver this share of an event, and hang up without waiting for an answer."""
        signature = self.signature(sample.body)
        async with connected(self.address, self.timeout) as wire:
            part = sample.body[: int(len(sample.body) * share)]
            await wire.send(head(self.address, [signature], len(sample.body)) + part)

    # ── Expecting ───────────────────────────────────────────────────────────────────────────────────────────

    async def accepts(self, sample: Sample, *signatures: str, what: str = "") -> None:
        """Deliver an event, freshly signed unless `signatures` are given. Raises Fault unless that is 2xx."""
        answer = await self.post(sample.body, *(signatures or [self.signature(sample.body)]))
        if not answer.accepted:
            raise Fault(f"{what}{': ' if what else ''}{told(answer)}")

    async def accepts_again(self, sample: Sample, *, what: str = "") -> None:
        """Deliver an event anew as Stripe does after a failure, several times if need be, ever further apart.

        Raises Fault unless it is accepted within the timeout: a receiver that is still busy with the first
        delivery may send the second away, but must come to an end with it.
        """
        deadline, pause = time.monotonic() + self.timeout, _FIRST_PAUSE
        while True:
            answer = await self.post(sample.body, self.signature(sample.body))
            if answer.accepted:
                return
            if time.monotonic() + pause > deadline:
                raise Fault(f"{what}{': ' if what else ''}{told(answer)}")
            await asyncio.sleep(pause)
            pause *= 2

    async def refuses(self, sample: Sample, *signatures: str, body: bytes | None = None, what: str = "") -> None:
        """Deliver what must not be believed. Raises Fault unless the answer is 4xx and nothing is kept."""
        answer = await self.post(sample.body if body is None else body, *signatures)
        prefix = f"{what}: " if what else ""
        if not answer.refused:
            raise Fault(f"{prefix}{told(answer)}, where only a 4xx is right")
        if await self._event(sample.event_id) is not None:
            raise Fault(f"{prefix}{told(answer)}, but the event was stored all the same")

    # ── Looking behind the answer ───────────────────────────────────────────────────────────────────────────

    async def effect(self, sample: Sample, *, what: str = "") -> bool:
        """Wait until an acknowledged event has had its effect, once. False when there is nothing to observe.

        Raises Fault when it is not stored, not processed, processed more than once, or left no object.
        """
        prefix = f"{what}: " if what else ""
        if self.events is not None:
            seen = await self._settled(sample.event_id)
            if seen is None:
                raise Fault(f"{prefix}acknowledged, but not stored")
            if seen.times is not None and seen.times > 1:
                raise Fault(f"{prefix}stored or processed {seen.times} times")
            if seen.status not in (None, "processed"):
                raise Fault(f"{prefix}acknowledged, but it stays {seen.status}")
        if self.objects is not None and sample.object_id is not None and sample.leaves_object:
            if not await self._there(sample.object_type, sample.object_id):
                raise Fault(f"{prefix}acknowledged, but its {sample.object_type} is not there")
            return True
        return self.events is not None

    async def _settled(self, event_id: str) -> EventSeen | None:
        deadline = time.monotonic() + self.timeout
        while True:
            seen = await self._event(event_id)
            over = time.monotonic() > deadline
            if over or (seen is not None and seen.status in (None, "processed", "failed")):
                return seen
            await asyncio.sleep(_LOOK_EVERY)

    async def _there(self, object_type: str, object_id: str) -> bool:
        deadline = time.monotonic() + self.timeout
        while await self.object(object_type, object_id) is None:
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(_LOOK_EVERY)
        return True

    async def _event(self, event_id: str) -> EventSeen | None:
        try:
            return await self.events.event(event_id) if self.events is not None else None
        except ViewFailed as error:
            raise Fault(f"the view of events failed: {error}") from error

    async def object(self, object_type: str, object_id: str) -> dict[str, object] | None:
        """What the receiver holds of an object now. Raises Unseen where it does not show that."""
        if self.objects is None:
            raise Unseen(NOTHING_TO_OBSERVE)
        try:
            found = await self.objects.object(object_type, object_id)
        except ViewFailed as error:
            raise Fault(f"the view of objects failed: {error}") from error
        return dict(found) if found is not None else None


def told(answer: Answer) -> str:
    """An answer in words, with what Stripe makes of it where that surprises."""
    redirected = answer.status is not None and 300 <= answer.status < 400
    return f"{answer}: to Stripe a redirect is a failure" if redirected else str(answer)
