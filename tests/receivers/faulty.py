"""Receivers with one fault each. Every one of these faults is in somebody's production."""

import asyncio
import json
from typing import Any, ClassVar

from tests.receivers.sound import SECRETS, Held, Receiver, Refused, Request


async def left_within(reader: asyncio.StreamReader, seconds: float) -> bool:
    """Whether the client closes its half, or leaves, within so many seconds."""
    leaving = asyncio.create_task(reader.read())
    left, _ = await asyncio.wait([leaving], timeout=seconds)
    leaving.cancel()
    return bool(left)


class OtherSecret(Receiver):
    """Verifies with a secret that is not the endpoint's."""

    secrets = ("whsec_of_another_endpoint",)


class Redirects(Receiver):
    """Answers from somewhere else, as a server does whose path ends with a slash."""

    async def deliver(self, request: Request, reader: asyncio.StreamReader) -> int:
        return 307


class SpeaksSomethingElse(Receiver):
    """Is another server than the address is thought to be."""

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"-ERR unknown command 'POST'\r\n\r\n")
        await writer.drain()


class VerifiesWhatItRewrote(Receiver):
    """Reads the JSON first, and verifies what it writes again: not the bytes that were signed."""

    def verify(self, body: bytes, lines: list[str]) -> None:
        super().verify(json.dumps(json.loads(body)).encode(), lines)


class TakesUnsigned(Receiver):
    """Verifies the header where there is one."""

    def verify(self, body: bytes, lines: list[str]) -> None:
        if lines:
            super().verify(body, lines)


class NeedsTheHeader(Receiver):
    """Takes for granted that the header is there."""

    def signatures(self, lines: list[str]) -> tuple[str, list[str]]:
        return super().signatures([lines[0]])


class StoresFirst(Receiver):
    """Refuses forgeries, but has written them down by then."""

    async def deliver(self, request: Request, reader: asyncio.StreamReader) -> int:
        body = await self.body(request, reader)
        self.statuses.setdefault(json.loads(body)["id"], "received")
        self.verify(body, request.all("stripe-signature"))
        self.process(json.loads(body))
        return 200


class NeverVerifies(Receiver):
    """Looks at the stamp, and believes the rest."""

    def verify(self, body: bytes, lines: list[str]) -> None:
        self.signatures(lines)


class TakesAnyScheme(Receiver):
    """Takes v0 for as good as v1."""

    schemes = ("v1", "v0")


class NeverTooOld(Receiver):
    """Tolerance 0 in some libraries: no limit at all."""

    oldest = float("inf")


class SoonTooOld(Receiver):
    """A tolerance of one minute."""

    oldest = 60


class NeverTooNew(Receiver):
    """As Stripe's own library."""

    newest = float("inf")


class ReadsTheFirst(Receiver):
    """Takes the first v1 for the only one."""

    def signatures(self, lines: list[str]) -> tuple[str, list[str]]:
        stamp, given = super().signatures(lines)
        return stamp, given[:1]


class ReadsTheLast(Receiver):
    """Makes a dict of the header: the last v1 replaces the others."""

    def signatures(self, lines: list[str]) -> tuple[str, list[str]]:
        stamp, given = super().signatures(lines)
        return stamp, given[-1:]


class ExpectsOneLine(Receiver):
    """Breaks on a header that is there twice."""

    def signatures(self, lines: list[str]) -> tuple[str, list[str]]:
        if len(lines) > 1:
            raise ValueError("too many")
        return super().signatures(lines)


class BelievesTheSecondLine(Receiver):
    """A second line is an older proxy's way of saying that it has verified the first."""

    def verify(self, body: bytes, lines: list[str]) -> None:
        if len(lines) < 2:
            super().verify(body, lines)


class OneSecret(Receiver):
    """Knows the old secret only."""

    secrets = SECRETS[:1]


class Conflicts(Receiver):
    """Says 409 to what it has seen."""

    async def take(self, event: dict[str, Any], body: bytes) -> int:
        if event["id"] in self.statuses:
            raise Refused(409)
        return await super().take(event, body)


class ProcessesEach(Receiver):
    """Never asks whether it has seen an event."""

    async def take(self, event: dict[str, Any], body: bytes) -> int:
        self.process(event)
        return 200


class AsksFirst(Receiver):
    """Asks whether the event is there, then puts it there: between the two is the time of a round trip."""

    async def take(self, event: dict[str, Any], body: bytes) -> int:
        known = event["id"] in self.statuses
        await asyncio.sleep(0.1)
        if not known:
            if event["id"] in self.statuses:
                raise ValueError("unique violation")
            self.process(event)
        return 200


class AsksFirstWithoutAKey(AsksFirst):
    """The same, and nothing in the database refuses the second."""

    async def take(self, event: dict[str, Any], body: bytes) -> int:
        known = event["id"] in self.statuses
        await asyncio.sleep(0.1)
        if not known:
            self.process(event)
        return 200


class NotesFirst(Receiver):
    """Notes the id, then works; when the work fails, the id is noted all the same."""

    async def take(self, event: dict[str, Any], body: bytes) -> int:
        if event["id"] in self.statuses:
            return 200
        self.statuses[event["id"]] = "received"
        subject = (event.get("data") or {}).get("object") or {}
        if subject.get("object") == "subscription" and subject["customer"] not in self.held:
            raise ValueError("foreign key violation")
        self.process(event)
        return 200


class NotesFirstUnseen(NotesFirst):
    """The same, and its view of events does not say what became of them."""

    def show(self, path: str) -> tuple[int, dict[str, Any]]:
        status, shown = super().show(path)
        return status, {name: value for name, value in shown.items() if name not in ("status", "times")}


class StopsWhenTheClientLeaves(Receiver):
    """Drops its work when the connection goes, as some frameworks do; the id is noted by then."""

    async def deliver(self, request: Request, reader: asyncio.StreamReader) -> int:
        body = await self.body(request, reader)
        self.verify(body, request.all("stripe-signature"))
        event = json.loads(body)
        if event["id"] not in self.statuses:
            self.statuses[event["id"]] = "received"
            if await left_within(reader, 0.2):
                raise ConnectionError("the client has left")
            self.process(event)
        return 200


class BreaksOnSubscriptions(Receiver):
    """Breaks on subscriptions, however often they come."""

    async def take(self, event: dict[str, Any], body: bytes) -> int:
        subject = (event.get("data") or {}).get("object") or {}
        if subject.get("object") == "subscription":
            raise ValueError("foreign key violation")
        return await super().take(event, body)


class LastWins(Receiver):
    """Keeps whatever came last."""

    def is_newer(self, now: Held, before: Held) -> bool:
        return True


class StrictlyNewer(Receiver):
    """Keeps what has a later second."""

    def is_newer(self, now: Held, before: Held) -> bool:
        return now.created > before.created


class NotOlder(Receiver):
    """Keeps what does not have an earlier second."""

    def is_newer(self, now: Held, before: Held) -> bool:
        return now.created >= before.created


class KnowsItsTypes(Receiver):
    """Refuses what it has no handler for."""

    async def take(self, event: dict[str, Any], body: bytes) -> int:
        if not event["type"].startswith(("customer.", "invoice.", "payment_method.", "balance.", "v1.")):
            raise Refused(400)
        return await super().take(event, body)


class NeedsAnId(Receiver):
    """Every object has an id, hasn't it?"""

    def project(self, event: dict[str, Any]) -> None:
        if "data" in event:
            event["data"]["object"]["id"]
        super().project(event)


class NeedsData(Receiver):
    """Every event has data."""

    def project(self, event: dict[str, Any]) -> None:
        event["data"]["object"]
        super().project(event)


class StoresParsed(Receiver):
    """Stores JSON where no NUL can be stored."""

    async def take(self, event: dict[str, Any], body: bytes) -> int:
        if b"\\u0000" in body:
            raise ValueError("unsupported Unicode escape sequence")
        return await super().take(event, body)


class KnowsTheNewShape(Receiver):
    """Was written this year."""

    def kept(self, subject: dict[str, Any]) -> dict[str, Any]:
        if subject["object"] == "subscription":
            subject["items"]["data"][0]["current_period_end"]
        return super().kept(subject)


class KnowsTheOldShape(Receiver):
    """Was written two years ago, and asks politely: what is not there is null."""

    def kept(self, subject: dict[str, Any]) -> dict[str, Any]:
        if subject["object"] == "invoice":
            return subject | {"subscription": subject.get("subscription")}
        return super().kept(subject)


class HundredKilobytes(Receiver):
    """A body parser's default."""

    limit: ClassVar[int] = 100_000


class ReadsEverything(Receiver):
    """No limit."""

    limit: ClassVar[int] = 2**40


class LimitsTheAnnounced(Receiver):
    """Limits what is announced; what comes in chunks announces nothing."""

    async def chunked(self, reader: asyncio.StreamReader) -> bytes:
        body = b""
        while size := int(await reader.readuntil(b"\r\n"), 16):
            body += (await reader.readexactly(size + 2))[:-2]
        return body


class BreaksOnLarge(Receiver):
    """The limit is the storage's, so it is an error."""

    async def take(self, event: dict[str, Any], body: bytes) -> int:
        if len(body) >= 1024 * 1024:
            raise ValueError("too large")
        return await super().take(event, body)

    limit: ClassVar[int] = 2 * 1024 * 1024


class OneAtATime(Receiver):
    """One worker, which waits for whoever it serves."""

    def __init__(self) -> None:
        super().__init__()
        self._worker = asyncio.Lock()

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with self._worker:
            await super().connection(reader, writer)


class BreaksOnPieces(Receiver):
    """Takes what has come so far for everything."""

    async def body(self, request: Request, reader: asyncio.StreamReader) -> bytes:
        return await reader.read(self.limit)

    def verify(self, body: bytes, lines: list[str]) -> None:
        json.loads(body)
        super().verify(body, lines)


class WaitsForEver(Receiver):
    """Waits for the rest of a body from a client that has said it is done."""

    async def cut_off(self) -> None:
        await asyncio.Event().wait()


class HearsNothingMore(Receiver):
    """Takes a closed half for a reason to break."""

    async def deliver(self, request: Request, reader: asyncio.StreamReader) -> int:
        body = await self.body(request, reader)
        if await left_within(reader, 0.2):
            raise ValueError("the client has left")
        self.verify(body, request.all("stripe-signature"))
        return await self.take(json.loads(body), body)
