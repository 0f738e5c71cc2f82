"""Registering handlers, running them, and what is kept of an error."""

import asyncio
import functools
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kamiyo
from kamiyo import handlers
from kamiyo.database import Connection
from kamiyo.errors import SettingsError
from kamiyo.event import Event, parse
from kamiyo.handlers import (
    GUIDE_TYPES,
    Bury,
    Handler,
    HandlerTimeout,
    Registry,
    Retry,
    failure_of,
    registry,
    supported_types,
)
from tests.conftest import DEADLINE, ROOT, event_json


@pytest.fixture
def event() -> Event:
    return parse(event_json("evt_1", "invoice.paid"), received=0)


def noting(notes: list[str], name: str) -> Handler:
    async def handler(event: Event, db: Connection) -> None:
        notes.append(name)

    return handler


# ── Registering ───────────────────────────────────────────────────────────────────────────────────────────


def test_what_user_code_needs_is_at_the_top_of_the_package() -> None:
    assert set(kamiyo.__all__) == {"Bury", "Connection", "Event", "Retry", "on"}
    assert (kamiyo.on, kamiyo.Retry, kamiyo.Bury) == (handlers.on, Retry, Bury)
    assert (kamiyo.Event, kamiyo.Connection) == (Event, Connection)


def test_handlers_of_a_type_keep_the_order_they_were_registered_in() -> None:
    own = Registry()
    first, second = noting([], "1"), noting([], "2")
    assert own.on("b", "a")(first) is first
    own.on("a")(second)
    assert own.of("a") == (first, second)
    assert own.of("b") == (first,)
    assert own.of("c") == ()
    assert own.types() == ("b", "a")


def test_registering_a_handler_twice_runs_it_once() -> None:
    own, handler = Registry(), noting([], "1")
    own.on("a")(handler)
    own.on("a", "a")(handler)
    assert own.of("a") == (handler,)


def test_asking_for_a_type_does_not_make_it_one_with_handlers() -> None:
    own = Registry()
    assert own.of("a") == ()
    assert own.types() == ()


def test_a_function_that_is_not_async_is_refused_where_it_is_written() -> None:
    def handler(event: Event, db: Connection) -> None: ...

    with pytest.raises(TypeError, match="async def"):
        Registry().on("a")(handler)  # type: ignore[arg-type]  # the very mistake


def test_a_function_that_does_not_take_event_and_connection_is_refused_where_it_is_written() -> None:
    async def handler(event: Event) -> None: ...

    with pytest.raises(TypeError, match=r"test_handlers\..*handler must take the event and a connection"):
        Registry().on("a")(handler)  # type: ignore[arg-type]  # the very mistake


def test_a_partial_of_an_async_function_is_a_handler() -> None:
    async def handler(event: Event, db: Connection, *, colour: str) -> None: ...

    own, partial = Registry(), functools.partial(handler, colour="red")
    own.on("a")(partial)
    assert own.of("a") == (partial,)


@pytest.mark.parametrize("types", [(), ("",), ("a", "")])
def test_a_handler_of_no_type_is_refused(types: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="takes event types"):
        Registry().on(*types)


def test_the_decorator_without_a_call_is_refused() -> None:
    with pytest.raises(ValueError, match="takes event types"):
        Registry().on(noting([], "1"))  # type: ignore[arg-type]  # @on instead of @on("…")


def test_the_ten_are_the_guides_in_its_order_and_a_handler_adds_its_type_once() -> None:
    guide = [line[3:-1] for line in GUIDE.splitlines()]
    assert supported_types() == guide == list(GUIDE_TYPES)
    registry.on("invoice.paid", "customer.created")(noting([], "1"))
    assert supported_types() == [*guide, "invoice.paid"]


GUIDE = """\
- `customer.created`
- `customer.updated`
- `customer.deleted`
- `customer.subscription.created`
- `customer.subscription.updated`
- `customer.subscription.deleted`
- `invoice.payment_succeeded`
- `invoice.payment_failed`
- `payment_method.attached`
- `payment_method.detached`"""


# ── Loading the user's modules ────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Write a module of the user's into the folder the server is started in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(ROOT), *(part for part in sys.path if part)])

    def write(name: str, text: str) -> None:
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)

    return write


def test_a_module_in_the_users_folder_is_found_and_its_handlers_registered(
    module: Callable[[str, str], None],
) -> None:
    module("my_billing_a", "from kamiyo import on\n@on('charge.refunded')\nasync def refund(event, db): ...\n")
    handlers.load(["my_billing_a"])
    assert registry.types() == ("charge.refunded",)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import nothing_of_this_name", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("def broken(:", "SyntaxError"),
        ("1/0", "ZeroDivisionError"),
        ("from kamiyo import on\n@on('a')\ndef f(event, db): ...", "must be `async def`"),
    ],
)
def test_a_module_that_cannot_be_imported_stops_the_start_with_its_name(
    text: str, said: str, module: Callable[[str, str], None]
) -> None:
    module("my_billing_b", text)
    with pytest.raises(SettingsError, match="KAMIYO_HANDLERS: cannot import my_billing_b: ") as caught:
        handlers.load(["my_billing_b"])
    assert said in str(caught.value)


def test_a_module_that_is_not_there_is_named() -> None:
    with pytest.raises(SettingsError, match="cannot import no_such_billing"):
        handlers.load(["no_such_billing"])


# ── Running ───────────────────────────────────────────────────────────────────────────────────────────────


async def test_handlers_run_one_after_another_in_the_callers_transaction(db: Connection, event: Event) -> None:
    await db.execute("CREATE TEMPORARY TABLE notes (id serial, word text)")

    def writing(word: str) -> Handler:
        async def handler(event: Event, db: Connection) -> None:
            assert db.is_in_transaction()
            await db.execute("INSERT INTO notes (word) VALUES ($1)", f"{word} {event.id}")

        return handler

    async with db.transaction():
        await handlers.run(db, event, [writing("first"), writing("second")], timeout=10)
    assert [word for (word,) in await db.fetch("SELECT word FROM notes ORDER BY id")] == [
        "first evt_1",
        "second evt_1",
    ]


async def test_an_error_of_one_handler_keeps_the_next_from_running(db: Connection, event: Event) -> None:
    async def failing(event: Event, db: Connection) -> None:
        raise LookupError("no such account")

    notes: list[str] = []
    with pytest.raises(LookupError, match="no such account"):
        await handlers.run(db, event, [noting(notes, "1"), failing, noting(notes, "3")], timeout=10)
    assert notes == ["1"]


async def test_a_handler_that_takes_too_long_is_stopped_and_named(db: Connection, event: Event) -> None:
    stopped = asyncio.Event()

    async def endless(event: Event, db: Connection) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    with pytest.raises(HandlerTimeout, match=r"endless took longer than 0\.02 s"):
        await handlers.run(db, event, [endless], timeout=0.02)
    assert stopped.is_set()


async def test_a_handlers_own_timeout_is_its_own_error(db: Connection, event: Event) -> None:
    async def impatient(event: Event, db: Connection) -> None:
        async with asyncio.timeout(0):
            await asyncio.Event().wait()

    with pytest.raises(TimeoutError) as caught:
        await handlers.run(db, event, [impatient], timeout=10)
    assert not isinstance(caught.value, HandlerTimeout)


async def test_each_handler_has_the_whole_time(db: Connection, event: Event, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, passed = asyncio.get_running_loop(), 0.0
    clock = loop.time
    # Two thirds of the time pass in each, by a clock that no busy machine can make go faster.
    monkeypatch.setattr(loop, "time", lambda: clock() + passed)

    async def patient(event: Event, db: Connection) -> None:
        nonlocal passed
        passed += 2 * DEADLINE
        await db.execute("SELECT 1")

    async def endless(event: Event, db: Connection) -> None:
        nonlocal passed
        passed += 2 * DEADLINE
        await asyncio.Event().wait()

    await handlers.run(db, event, [patient, patient], timeout=3 * DEADLINE)
    with pytest.raises(HandlerTimeout):
        await handlers.run(db, event, [endless], timeout=2 * DEADLINE)


# ── What a handler says ───────────────────────────────────────────────────────────────────────────────────


def test_another_try_can_be_asked_for_in_seconds_or_as_a_timedelta() -> None:
    assert Retry(after=90).after == Retry(after=timedelta(minutes=1.5)).after == 90.0


@pytest.mark.parametrize("after", [-1, 30 * 86400 + 1, float("inf"), float("nan"), timedelta(days=-1)])
def test_another_try_before_now_or_after_a_month_is_refused(after: float | timedelta) -> None:
    with pytest.raises(ValueError, match="0 seconds to 30 days"):
        Retry(after=after)


# ── What is kept of an error ──────────────────────────────────────────────────────────────────────────────


def caught(raising: Callable[[], object]) -> BaseException:
    try:
        raising()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def divide() -> float:
    return 1 / 0


NOBODY: dict[str, object] = {}


def look_up(name: str) -> object:
    return NOBODY[name]


def test_a_failure_has_type_message_and_traceback() -> None:
    failure = failure_of(caught(divide))
    assert (failure.error_type, failure.message) == ("ZeroDivisionError", "division by zero")
    assert "in divide" in failure.traceback and "test_handlers.py" in failure.traceback


def test_the_fingerprint_is_of_the_cause_not_of_the_event_it_struck() -> None:
    one, other = failure_of(caught(lambda: look_up("cus_1"))), failure_of(caught(lambda: look_up("cus_2")))
    assert one.message != other.message
    assert one.fingerprint == other.fingerprint
    assert failure_of(caught(divide)).fingerprint != one.fingerprint


def test_the_same_error_at_another_place_has_another_fingerprint() -> None:
    def elsewhere() -> object:
        return NOBODY["cus_1"]

    assert failure_of(caught(elsewhere)).fingerprint != failure_of(caught(lambda: look_up("cus_1"))).fingerprint


@pytest.mark.parametrize(
    ("error", "name"), [(Retry(5), "Retry"), (Bury("never"), "Bury"), (HandlerTimeout(), "HandlerTimeout")]
)
def test_kamiyos_own_words_go_by_their_short_names(error: Exception, name: str) -> None:
    assert failure_of(error).error_type == name


def test_an_error_without_a_message_is_named_by_its_type() -> None:
    assert failure_of(KeyboardInterrupt()).message == "KeyboardInterrupt"


@given(st.text(st.characters(), max_size=3000))
def test_whatever_an_error_says_the_database_can_hold_it(words: str) -> None:
    failure = failure_of(RuntimeError(words))
    assert len(failure.message) <= 2000
    for kept in (failure.message, failure.traceback, failure.error_type):
        assert "\0" not in kept
        assert kept.encode()


def test_a_long_traceback_keeps_its_end_where_the_cause_is() -> None:
    def deep(n: int) -> float:
        return deep(n - 1) + 1 if n else deepest()

    def deepest() -> float:
        raise LookupError("x" * 30_000 + "the very end")

    failure = failure_of(caught(lambda: deep(100)))
    assert len(failure.traceback) <= 16_000
    assert failure.traceback.rstrip().endswith("the very end")
