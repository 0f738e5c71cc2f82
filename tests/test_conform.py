"""The conformance kit: each check is seen to fail at a receiver with its fault, and to pass without."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
import uvicorn
from fastapi import FastAPI
from typer.testing import CliRunner

from kamiyo import conform
from kamiyo.cli.conform import conform as conform_command
from kamiyo.conform import CHECKS, Check, ConformError, Outcome, Result
from tests.conftest import ADMIN_KEY, DEADLINE, PREFIX, ROOT, NewDatabase, serving
from tests.receivers import faulty
from tests.receivers.handwritten import create_handwritten
from tests.receivers.sound import SECRETS, Receiver

DOCS = ROOT / "docs" / "conformance.md"

#: Every fault, the check that finds it, and what the check says of it.
FAULTS: list[tuple[type[Receiver], str, str]] = [
    (faulty.OtherSecret, "signed event", "answered 400"),
    (faulty.Redirects, "signed event", "answered 307: to Stripe a redirect is a failure"),
    (faulty.SpeaksSomethingElse, "signed event", "answered something that is not HTTP"),
    (faulty.VerifiesWhatItRewrote, "signed event", "answered 400"),
    (faulty.TakesUnsigned, "no signature", "answered 200, where only a 4xx is right"),
    (faulty.NeedsTheHeader, "no signature", "answered 500, where only a 4xx is right"),
    (faulty.StoresFirst, "no signature", "answered 400, but the event was stored all the same"),
    (faulty.NeverVerifies, "foreign secret", "answered 200, where only a 4xx is right"),
    (faulty.NeverVerifies, "altered byte", "answered 200, where only a 4xx is right"),
    (faulty.TakesAnyScheme, "old scheme only", "answered 200, where only a 4xx is right"),
    (faulty.NeverTooOld, "old stamp", "signed ten minutes ago: answered 200, where only a 4xx is right"),
    (faulty.SoonTooOld, "old stamp", "signed two minutes ago: answered 400"),
    (faulty.NeverTooNew, "future stamp", "ten minutes ahead: answered 200, where only a 4xx is right"),
    (faulty.ReadsTheFirst, "two v1 signatures", "the good one second: answered 400"),
    (faulty.ReadsTheLast, "two v1 signatures", "the good one first: answered 400"),
    (faulty.ExpectsOneLine, "two header lines", "a good and a foreign line: answered 500"),
    (faulty.BelievesTheSecondLine, "two header lines", "two foreign lines: answered 200"),
    (faulty.OneSecret, "rolled secrets", "secret 2: answered 400"),
    (faulty.Conflicts, "duplicate", "the second time: answered 409"),
    (faulty.ProcessesEach, "duplicate", "stored or processed 2 times"),
    (faulty.AsksFirst, "concurrent duplicates", "of 48 copies: answered 500"),
    (faulty.AsksFirstWithoutAKey, "concurrent duplicates", "stored or processed 1"),
    (
        faulty.NotesFirst,
        "redelivery after a failure",
        "before its customer (answered 500), then again: acknowledged, but it stays received",
    ),
    (
        faulty.NotesFirstUnseen,
        "redelivery after a failure",
        "before its customer (answered 500), then again: acknowledged, but its subscription is not there",
    ),
    (
        faulty.StopsWhenTheClientLeaves,
        "redelivery after a failure",
        "hung up after the last byte: acknowledged, but it stays received",
    ),
    (
        faulty.BreaksOnSubscriptions,
        "redelivery after a failure",
        "before its customer (answered 500), then again: answered 500",
    ),
    (faulty.LastWins, "older event last", "the older one won: status"),
    (faulty.StrictlyNewer, "same second, in order", "the older one won: email, name"),
    (faulty.NotOlder, "same second, reversed", "the older one won: email, name"),
    (faulty.KnowsItsTypes, "unknown type", "answered 400"),
    (faulty.NeedsAnId, "object without id", "invoice.upcoming: answered 500"),
    (faulty.NeedsData, "thin event", "answered 500"),
    (faulty.StoresParsed, "\\u0000 in metadata", "answered 500"),
    (
        faulty.KnowsTheNewShape,
        "old and new shapes",
        "customer.subscription.created as of 2024-06-20: answered 500",
    ),
    (faulty.KnowsTheOldShape, "old and new shapes", "as of 2025-03-31.basil, invoice.subscription is empty"),
    (faulty.HundredKilobytes, "a large event", "answered 413"),
    (faulty.ReadsEverything, "1 MiB and more", "1 GiB announced, unsigned: it waits for all of it"),
    (faulty.LimitsTheAnnounced, "1 MiB and more", "8 MiB in chunks, unsigned: not refused before its end"),
    (faulty.BreaksOnLarge, "1 MiB and more", "a signed event of 1 MiB and one byte: answered 500"),
    (faulty.OneAtATime, "slow body", "the other deliveries had to wait for it"),
    (faulty.BreaksOnPieces, "slow body", "the slow one itself: answered 500"),
    (faulty.WaitsForEver, "half-closed connection", "closed half way: gave no answer in time"),
    (faulty.HearsNothingMore, "half-closed connection", "closed after the last byte: answered 500"),
]


#: Faults that show as waiting in vain: the wait is made short, though longer than a busy machine takes for the rest of
#: the check. All others have time enough for any machine.
WAITING = {
    faulty.NotesFirst,
    faulty.NotesFirstUnseen,
    faulty.StopsWhenTheClientLeaves,
    faulty.BreaksOnSubscriptions,
    faulty.ReadsEverything,
    faulty.WaitsForEver,
}


#: All checks but the one that takes its time on purpose.
QUICK = [check for check in CHECKS if check.name != "slow body"]


@contextlib.asynccontextmanager
async def target_at(
    url: str,
    path: str = "/",
    *,
    secrets: Sequence[str] = SECRETS,
    seconds: float = DEADLINE,
    trickle_seconds: float = 1,
    views: bool = True,
) -> AsyncIterator[conform.Target]:
    """A target that shows its events and objects as `tests.receivers` do."""
    async with httpx.AsyncClient(trust_env=False) as client:
        objects = conform.ObjectAddress(client, url + "/objects/{object_type}/{object_id}")
        yield conform.Target(
            address=conform.Address.of(url + path),
            secrets=tuple(secrets),
            timeout=seconds,
            trickle_seconds=trickle_seconds,
            events=conform.EventAddress(client, url + "/events/{event_id}") if views else None,
            objects=objects if views else None,
        )


def named(name: str) -> Check:
    """The check of this name."""
    [found] = [check for check in CHECKS if check.name == name]
    return found


def failed(results: Sequence[Result]) -> dict[str, str]:
    """The checks that did not pass, and what they say."""
    return {
        result.check.name: result.verdict.detail for result in results if result.verdict.outcome is not Outcome.passed
    }


# ── Each check can fail ─────────────────────────────────────────────────────────────────────────────────────


async def test_a_sound_receiver_passes_every_check() -> None:
    async with Receiver().serving() as url, target_at(url) as target:
        assert failed(await conform.run(target)) == {}


@pytest.mark.parametrize(("fault", "check", "words"), FAULTS, ids=lambda value: getattr(value, "__name__", None))
async def test_a_check_fails_at_a_receiver_that_has_its_fault(fault: type[Receiver], check: str, words: str) -> None:
    seconds = 1.5 if fault in WAITING else DEADLINE
    async with fault().serving() as url, target_at(url, seconds=seconds) as target:
        verdict = await named(check).run(target)
    assert verdict.outcome is Outcome.failed
    assert words in verdict.detail


def test_every_check_is_seen_to_fail_and_every_fault_is_found_by_one() -> None:
    assert {check for _, check, _ in FAULTS} == {check.name for check in CHECKS}
    written = {
        value
        for value in vars(faulty).values()
        if isinstance(value, type) and issubclass(value, Receiver) and value is not Receiver
    }
    assert written == {fault for fault, _, _ in FAULTS}


async def test_without_views_what_needs_one_is_skipped_and_never_passed() -> None:
    async with faulty.LastWins().serving() as url, target_at(url, views=False) as target:
        results = await conform.run(target, QUICK)
    unseen = "nothing to observe behind the answers"
    assert failed(results) == {
        "redelivery after a failure": f"each is accepted the second time; {unseen}",
        "older event last": unseen,
        "same second, in order": unseen,
        "same second, reversed": unseen,
    }
    [duplicate] = [result.verdict for result in results if result.check.name == "duplicate"]
    assert duplicate.detail == f"accepted twice; {unseen}"


async def test_with_one_secret_the_roll_is_skipped() -> None:
    async with Receiver().serving() as url, target_at(url, secrets=SECRETS[:1]) as target:
        verdict = await named("rolled secrets").run(target)
    assert verdict.outcome is Outcome.skipped


async def test_a_receiver_that_refuses_everything_passes_nothing() -> None:
    async with faulty.OtherSecret().serving() as url, target_at(url) as target:
        first, *others = await conform.run(target)
    assert first.failed
    assert {result.verdict.outcome for result in others} == {Outcome.skipped}


async def test_a_receiver_that_is_not_there_fails_the_first_check() -> None:
    # A port that nobody listens at, and that nobody else gets meanwhile.
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        async with target_at(f"http://127.0.0.1:{taken.getsockname()[1]}", views=False) as target:
            first, *_ = await conform.run(target)
    assert first.verdict == conform.Verdict(Outcome.failed, "could not be reached: the connection is refused")


async def test_a_check_takes_a_bounded_time_even_when_nobody_ever_answers() -> None:
    # The connections are made by the kernel; nobody takes them.
    with socket.create_server(("127.0.0.1", 0), backlog=200) as deaf:
        async with target_at(f"http://127.0.0.1:{deaf.getsockname()[1]}", seconds=0.05, views=False) as target:
            async with asyncio.timeout(DEADLINE):
                verdicts = [await check.run(target) for check in CHECKS if check.name != "rolled secrets"]
    assert {verdict.outcome for verdict in verdicts} == {Outcome.failed}


async def test_a_view_that_cannot_be_used_stops_the_run_with_a_sentence() -> None:
    async with Receiver().serving() as url, httpx.AsyncClient(trust_env=False) as client:
        address = conform.Address.of(url)
        everything = conform.ObjectAddress(client, url + "/objects/{object_id}")
        nowhere = conform.EventAddress(client, "http://127.0.0.1:1/{event_id}")
        with pytest.raises(ConformError, match=r"the view of events cannot be used: it gave no answer"):
            await conform.run(conform.Target(address=address, secrets=SECRETS, events=nowhere, objects=everything))


async def test_a_view_that_knows_what_was_never_sent_stops_the_run_with_a_sentence() -> None:
    class KnowsEverything(Receiver):
        def show(self, path: str) -> tuple[int, dict[str, Any]]:
            return 200, {"status": "processed"}

    async with KnowsEverything().serving() as url, target_at(url) as target:
        with pytest.raises(ConformError, match="must answer 404 for an id that was never sent"):
            await conform.run(target)


async def test_a_view_that_breaks_on_the_way_fails_the_check_that_looks() -> None:
    class Breaks(Receiver):
        def show(self, path: str) -> tuple[int, dict[str, Any]]:
            return (404, {}) if path.endswith("never_sent") else (500, {})

    async with Breaks().serving() as url, target_at(url) as target:
        first, *_ = await conform.run(target)
    assert first.verdict.detail == "the view of events failed: it answered 500"


async def test_an_interim_answer_is_not_the_answer() -> None:
    class SaysContinue(Receiver):
        async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            await super().answer(reader, writer)

    async with SaysContinue().serving() as url, target_at(url, views=False) as target:
        verdict = await named("signed event").run(target)
    assert verdict == conform.Verdict(Outcome.passed, "accepted")


@pytest.mark.parametrize(
    "url",
    [
        "receiver",
        "ftp://receiver/",
        "http://",
        "http://user:password@receiver/",
        "http://receiver:x/",
        "http://a/ b",
    ],
)
def test_an_address_that_is_no_receivers_is_refused(url: str) -> None:
    with pytest.raises(ConformError):
        conform.Address.of(url)


def test_an_address_names_its_port_only_where_it_must() -> None:
    assert conform.Address.of("https://receiver/hook?a=b").authority == "receiver"
    assert conform.Address.of("https://receiver/hook?a=b").path == "/hook?a=b"
    assert conform.Address.of("http://[::1]:8000").authority == "[::1]:8000"


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that nobody trusts yet, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    made, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    subprocess.run(
        [
            *(
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "rsa:2048",
                "-nodes",
                "-days",
                "1",
                "-subj",
                "/CN=127.0.0.1",
            ),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", made),
        ],
        check=True,
        capture_output=True,
    )
    return made, key


async def test_over_tls_a_sound_receiver_passes_what_there_is_of_it(
    certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(*certificate)
    async with Receiver().serving(tls) as url, target_at(url, views=False) as target:
        stranger = await named("signed event").run(target)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
        results = await conform.run(target, QUICK)
    assert "its certificate is not trusted" in stranger.detail
    assert [result.check.name for result in results if result.failed] == []
    assert "over TLS" in failed(results)["half-closed connection"]


# ── Ours, and the kind that most guides end at ──────────────────────────────────────────────────────────────


@contextlib.asynccontextmanager
async def served_here(app: FastAPI) -> AsyncIterator[str]:
    """`app` with a socket, on this event loop."""
    # asyncio turns Nagle's delay off only where the socket names its protocol.
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.bind(("127.0.0.1", 0))
    listening.listen(128)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
    task = asyncio.create_task(server.serve([listening]))
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task
        listening.close()


async def test_kamiyo_passes_every_check(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in (
        ("STRIPE_WEBHOOK_SECRET", ",".join(SECRETS)),
        ("ADMIN_API_KEY", ADMIN_KEY),
        ("DATABASE_URL", database_url),
    ):
        monkeypatch.setenv(name, value)
    with serving(database_url, STRIPE_WEBHOOK_SECRET=",".join(SECRETS)) as served:
        status, output = await invoke(f"{served.url}{PREFIX}/stripe", "--own", "--json")
    told = [json.loads(line) for line in output.splitlines()]
    assert [one for one in told if one["outcome"] != "passed"] == []
    assert (status, len(told)) == (0, len(CHECKS))
    # Each looked behind the answers, and saw something there.
    assert "nothing to observe" not in output


async def results_of_handwritten(new_database: NewDatabase) -> list[Result]:
    """What the kit says of the hand-written kind."""
    database_url = await asyncio.to_thread(lambda: new_database(migrated=False))
    async with (
        served_here(create_handwritten(database_url, SECRETS[0])) as url,
        target_at(url, "/webhooks/stripe", secrets=SECRETS[:1], seconds=3, trickle_seconds=2) as target,
    ):
        return await conform.run(target)


async def test_the_docs_show_what_the_kit_says_of_the_handwritten_kind(new_database: NewDatabase) -> None:
    theirs = await results_of_handwritten(new_database)
    page = DOCS.read_text()
    written = _with_table(_with_table(page, "checks", _explained()), "results", _compared(theirs))
    if os.environ.get("KAMIYO_WRITE_DOCS"):
        DOCS.write_text(written)
    assert page == written, "run this test once with KAMIYO_WRITE_DOCS=1 to bring docs/conformance.md up to date"


def _explained() -> str:
    rows = ["| check | what is sent | why it matters |", "|---|---|---|"]
    for check in CHECKS:
        sent = (check.judge.__doc__ or "").replace("\n\n", " ")
        rows.append(f"| {check.name} | {' '.join(sent.split())} | {check.why} |")
    return "\n".join(rows)


def _compared(theirs: Sequence[Result]) -> str:
    rows = ["| check | Kamiyo | hand-written | what was seen there |", "|---|---|---|---|"]
    for result in theirs:
        # How many of the copies lose the race is chance.
        seen = re.sub(r"\b\d+ of \d+ copies", "most copies", result.verdict.detail)
        # That Kamiyo passes is not written down but asserted, by the test above.
        rows.append(f"| {result.check.name} | passed | {_marked(result.verdict.outcome)} | {seen} |")
    return "\n".join(rows)


def _marked(outcome: Outcome) -> str:
    return f"**{outcome.value}**" if outcome is Outcome.failed else outcome.value


def _with_table(page: str, name: str, table: str) -> str:
    begin, end = f"<!-- {name}: made by tests/test_conform.py -->", f"<!-- end of {name} -->"
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    assert after, f"docs/conformance.md has no place for {name}"
    return f"{before}{begin}\n\n{table}\n\n{end}{after}"


# ── The command ─────────────────────────────────────────────────────────────────────────────────────────────


async def invoke(*arguments: str) -> tuple[int, str]:
    """Run `kamiyo conform` with these arguments, on a thread of its own; gives exit status and output."""
    app = typer.Typer()
    app.command()(conform_command)
    done = await asyncio.to_thread(CliRunner().invoke, app, list(arguments))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output


async def test_the_command_exits_0_when_all_passes_and_looks_behind_the_answers_where_it_is_told_to() -> None:
    async with Receiver().serving() as url:
        status, output = await invoke(
            *(url, "--secret", SECRETS[0], "--only", "same second, reversed", "--only", "duplicate"),
            *("--event-url", url + "/events/{event_id}", "--object-url", url + "/objects/x/{object_id}"),
        )
    assert status == 0
    assert re.search(r"^duplicate +passed +accepted twice, stored once", output, re.MULTILINE)
    assert re.search(r"^same second, reversed +passed +the later one stays", output, re.MULTILINE)
    assert "2 passed, 0 failed, 0 skipped" in output


async def test_the_command_says_of_what_it_could_not_see_that_it_is_not_passed() -> None:
    async with Receiver().serving() as url:
        status, output = await invoke(url, "--secret", SECRETS[0], "--only", "older event last")
    assert status == 0
    assert "0 passed, 0 failed, 1 skipped" in output
    assert "Skipped is not passed" in output


async def test_a_check_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConformError, match="no check is called duplicates; there are signed event"):
        await invoke("http://127.0.0.1:1/", "--secret", "whsec_x", "--only", "duplicates")


async def test_the_command_exits_1_and_says_why_when_a_check_fails() -> None:
    async with faulty.OtherSecret().serving() as url:
        status, output = await invoke(url, "--secret", SECRETS[0])
    assert status == 1
    assert "answered 400" in output
    assert "Without that nothing else can be judged." in " ".join(output.split())


async def test_the_command_prints_one_json_object_a_line_for_scripts() -> None:
    async with faulty.OtherSecret().serving() as url:
        status, output = await invoke(url, "--secret", SECRETS[0], "--json")
    told = [json.loads(line) for line in output.splitlines()]
    assert status == 1
    assert [one["check"] for one in told] == [check.name for check in CHECKS]
    assert told[0]["outcome"] == "failed"


async def test_the_command_asks_for_a_secret_where_it_finds_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConformError, match="--secret"):
        await invoke("http://127.0.0.1:1/")


async def test_a_template_without_its_place_is_refused() -> None:
    with pytest.raises(ConformError, match=r"--event-url needs \{event_id\}"):
        await invoke("http://127.0.0.1:1/", "--secret", "whsec_x", "--event-url", "http://127.0.0.1:1/")
