"""What is read from a body: the envelope, at the door; the object, later."""

import json
import time
import zlib
from collections.abc import Iterator
from dataclasses import FrozenInstanceError
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kamiyo.errors import PayloadError
from kamiyo.event import LONGEST_NAME, Event, decode, filed, lane_of, parse
from tests.conftest import ROOT, event_json

RECEIVED = 1_800_000_000.5
OBJECTS = ROOT / "kamiyo" / "simulator" / "objects"

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
ENVELOPE_KEYS = ("id", "object", "type", "created", "livemode", "account", "context", "api_version", "data")
MORE_KEYS = ("related_object", "snapshot_event", "pending_webhooks", "request")


def read(value: Any) -> Event:
    return parse(json.dumps(value).encode(), received=RECEIVED)


def envelope(**changes: Any) -> dict[str, Any]:
    return {
        "id": "evt_1",
        "object": "event",
        "type": "invoice.paid",
        "created": 1_700_000_000,
        "livemode": True,
        "api_version": "2026-10-28.endive",
        "data": {"object": {"id": "in_1", "object": "invoice", "customer": "cus_1"}},
        **changes,
    }


# ── Snapshots ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_snapshot_says_what_it_is_about_and_whose_it_is() -> None:
    body = json.dumps(envelope(account="acct_1", context="org_1")).encode()
    assert parse(body, received=RECEIVED) == Event(
        id="evt_1",
        type="invoice.paid",
        created=1_700_000_000,
        thin=False,
        livemode=True,
        account="acct_1",
        context="org_1",
        api_version="2026-10-28.endive",
        object_type="invoice",
        object_id="in_1",
        customer="cus_1",
        snapshot_event=None,
        body=body,
    )


@pytest.mark.parametrize("path", sorted(OBJECTS.glob("*.json")), ids=lambda path: path.stem)
def test_every_object_stripe_documents_can_be_the_subject_of_an_event(path: Path) -> None:
    subject = json.loads(path.read_text())
    event = parse(event_json("evt_1", "x.updated", subject), received=RECEIVED)
    assert (event.object_type, event.object_id) == (subject["object"], subject.get("id") or None)
    assert event.object == subject


def test_a_customer_is_its_own_customer() -> None:
    event = read(envelope(data={"object": {"id": "cus_9", "object": "customer"}}))
    assert event.customer == event.object_id == "cus_9"


@pytest.mark.parametrize(
    ("subject", "customer"),
    [
        ({"customer": "cus_1"}, "cus_1"),
        ({"customer": {"id": "cus_1", "object": "customer"}}, "cus_1"),
        ({"customer": None, "customer_account": "acct_2"}, "acct_2"),
        ({"customer": {"object": "customer"}}, None),
        ({"customer": 7}, None),
        ({"customer": ""}, None),
        ({}, None),
    ],
)
def test_the_customer_is_found_as_an_id_as_an_expanded_object_or_as_an_account(
    subject: dict[str, Any], customer: str | None
) -> None:
    assert read(envelope(data={"object": {"id": "in_1", "object": "invoice", **subject}})).customer == customer


def test_a_detached_payment_method_stays_in_the_line_of_the_customer_it_was_taken_from() -> None:
    attached = {"id": "pm_1", "object": "payment_method", "customer": "cus_1"}
    detached = read(
        envelope(data={"object": {**attached, "customer": None}, "previous_attributes": {"customer": "cus_1"}})
    )
    assert detached.customer == "cus_1"
    assert detached.lane == read(envelope(data={"object": attached})).lane


def test_an_object_without_an_id_is_still_an_event() -> None:
    event = read(envelope(type="invoice.upcoming", data={"object": {"object": "invoice", "customer": "cus_1"}}))
    assert (event.object_id, event.customer) == (None, "cus_1")


def test_an_event_cannot_be_changed() -> None:
    event = read(envelope())
    with pytest.raises(FrozenInstanceError):
        event.type = "charge.succeeded"  # type: ignore[misc]  # the very thing that must not work


def test_the_values_before_the_change_are_at_hand() -> None:
    event = read(envelope(data={"object": {"id": "in_1"}, "previous_attributes": {"status": "open"}}))
    assert event.previous_attributes == {"status": "open"}
    assert read(envelope()).previous_attributes == {}


# ── Thin events ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_thin_event_names_its_object_and_carries_none() -> None:
    event = read(
        {
            "id": "evt_test_1",
            "object": "v2.core.event",
            "type": "v1.customer.created",
            "created": "2026-10-28T12:00:00.250Z",
            "livemode": False,
            "context": "acct_1/org_2",
            "related_object": {"id": "cus_1", "type": "customer", "url": "/v1/customers/cus_1"},
            "snapshot_event": "evt_2",
        }
    )
    assert event.thin
    assert event.created == datetime(2026, 10, 28, 12, tzinfo=UTC).timestamp()
    assert (event.object_type, event.object_id, event.customer) == ("customer", "cus_1", "cus_1")
    assert (event.context, event.snapshot_event, event.object) == ("acct_1/org_2", "evt_2", {})


def test_a_thin_event_about_nothing_is_an_event() -> None:
    event = read({"id": "evt_1", "object": "v2.core.event", "type": "v2.core.event_destination.ping"})
    assert (event.thin, event.object_type, event.object_id, event.customer) == (True, None, None, None)


# ── What is refused ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not JSON",
        b"[]",
        b"null",
        b'"evt_1"',
        b"\xff\xfe",
        b'{"id":"evt_1","type":"x","object":"event"',
        b'{"id":"evt_1","type":"x","object":"event"}}',
        b'{"id":"evt_1","type":"x","object":"event","data":NaN}',
        b'{"id":"evt_1","type":"x","object":"event","data":-Infinity}',
        '{"id":"evt_1","type":"x","object":"event"}'.encode("utf-16"),
        b'{"id":"evt_\xff","type":"x","object":"event"}',
        b'{"id":"evt_1","type":"x","object":"event","data":{"object":{"name":"\xff"}}}',
        b'{"id":"evt_1","type":"x","object":"event","request":{"\xc3":1}}',
        b'{"id":"evt_1","type":"x","object":"event","data":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    ],
    ids=lambda body: repr(body[:70]),
)
def test_what_is_not_json_is_refused(body: bytes) -> None:
    with pytest.raises(PayloadError):
        parse(body, received=RECEIVED)


@pytest.mark.parametrize("name", ["id", "type"])
@pytest.mark.parametrize("value", [None, "", 7, [], {}, True, "a\0b", "x" * (LONGEST_NAME + 1)], ids=repr)
def test_an_id_and_a_type_must_be_names(name: str, value: Any) -> None:
    with pytest.raises(PayloadError):
        read(envelope(**{name: value}))
    with pytest.raises(PayloadError):
        read({key: given for key, given in envelope().items() if key != name})


@pytest.mark.parametrize("value", ["customer", "EVENT", "", None, 1, [], {"event": 1}, "v3.core.event"], ids=repr)
def test_an_object_that_says_it_is_no_event_is_refused(value: Any) -> None:
    with pytest.raises(PayloadError):
        read(envelope(object=value))


# ── What is odd, and accepted ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("data", [None, [], "x", 7, {"object": []}, {"object": None}, {"previous_attributes": 3}, {}])
def test_data_of_another_shape_is_an_event_about_nothing(data: Any) -> None:
    event = read(envelope(data=data))
    assert (event.object_type, event.object_id, event.customer, event.object) == (None, None, None, {})


def test_a_number_where_a_reference_should_be_hides_nothing_else() -> None:
    # `related_object` of another shape sends the envelope down the patient road, and all the rest must
    # arrive.
    event = read(envelope(related_object=[1], account="acct_1"))
    assert (event.id, event.customer, event.account, event.object_id) == ("evt_1", "cus_1", "acct_1", "in_1")


@pytest.fixture
def in_tokyo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as abroad:
        abroad.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.parametrize(
    ("created", "seconds"),
    [
        (0, 0),
        (253_402_300_799, 253_402_300_799),
        (253_402_300_800, int(RECEIVED)),
        (-1, int(RECEIVED)),
        (True, int(RECEIVED)),
        (1.5, int(RECEIVED)),
        (10**30, int(RECEIVED)),
        (None, int(RECEIVED)),
        ("soon", int(RECEIVED)),
        ("2026-10-28T12:00:00Z", 1_793_188_800),
        ("2026-10-28T12:00:00", 1_793_188_800),
        ("1969-12-31T23:59:59Z", int(RECEIVED)),
        ("0001-01-01T00:00:00+23:59", int(RECEIVED)),
        ("9999-12-31T23:59:59-23:59", int(RECEIVED)),
    ],
)
def test_stripes_time_is_taken_when_a_calendar_can_hold_it_and_ours_otherwise(
    created: Any, seconds: int, in_tokyo: None
) -> None:
    # A time without an offset is UTC, wherever the server stands.
    assert read(envelope(created=created)).created == seconds


def test_a_nul_in_the_users_own_text_is_kept() -> None:
    event = read(envelope(data={"object": {"id": "cus_1", "object": "customer", "name": "a\0b"}}))
    assert event.object["name"] == "a\0b"


def test_half_of_a_surrogate_pair_becomes_a_question_mark_where_it_would_stop_the_database() -> None:
    event = parse(rb'{"id":"evt_\ud800","type":"x","object":"event","data":{"object":{"name":"\udfff!"}}}', received=0)
    assert (event.id, event.object["name"]) == ("evt_?", "?!")


@given(st.dictionaries(st.sampled_from(ENVELOPE_KEYS + MORE_KEYS), json_values))
@example({"id": "evt_1", "type": "x", "object": "event", "data": {"object": {"customer": {"id": ["nested"]}}}})
@example({"id": "\ud800", "type": "\udfff", "object": "event"})
def test_any_json_is_an_event_that_the_database_can_hold_or_is_refused(value: dict[str, Any]) -> None:
    try:
        event = read({"id": "evt_1", "type": "x", "object": "event", **value})
    except PayloadError:
        return
    names = (
        event.account,
        event.context,
        event.api_version,
        event.object_type,
        event.object_id,
        event.customer,
    )
    for name in (event.id, event.type, event.snapshot_event, *names):
        assert name is None or (isinstance(name, str) and "\0" not in name and len(name) <= LONGEST_NAME)
        assert name is None or name.encode() is not None  # half of a surrogate pair would raise
    assert event.id and event.type
    assert 0 <= event.created <= 253_402_300_799
    assert 0 <= event.lane < 2**31
    assert isinstance(event.object, dict)


@given(st.dictionaries(st.text(), json_values))
def test_decoding_is_what_the_standard_parser_says(value: dict[str, Any]) -> None:
    body = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    try:
        body.decode()
    except UnicodeDecodeError:
        return
    assert decode(body) == json.loads(body)


@st.composite
def spoilt(draw: st.DrawFn) -> bytes:
    """An event with a few bytes changed, put in, or taken out anywhere."""
    body = bytearray(event_json("evt_1", obj={"id": "ch_1", "object": "charge", "note": "é \\ud83d [1, 2.5e3]"}))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(body) - 1))
        body[at : at + draw(st.integers(0, 2))] = draw(st.binary(max_size=2))
    return bytes(body)


@given(st.binary() | spoilt())
def test_any_bytes_are_refused_or_are_an_event_whose_json_can_be_read(body: bytes) -> None:
    try:
        event = parse(body, received=RECEIVED)
    except PayloadError:
        return
    assert event.payload == json.loads(body.decode("utf-8")) or "\\ud" in body.decode()


# ── Lanes ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_events_of_one_customer_share_a_lane_whatever_they_are_about() -> None:
    lanes = {
        read(envelope(data={"object": subject})).lane
        for subject in (
            {"id": "in_1", "object": "invoice", "customer": "cus_1"},
            {"id": "sub_1", "object": "subscription", "customer": {"id": "cus_1"}},
            {"id": "cus_1", "object": "customer"},
        )
    }
    assert lanes == {lane_of("", "cus_1")}


def test_accounts_have_lanes_of_their_own_and_the_orphans_go_by_object_and_by_event() -> None:
    lane = read(envelope()).lane
    assert read(envelope(account="acct_1")).lane == lane_of("acct_1", "cus_1") != lane
    assert read(envelope(data={"object": {"id": "pm_1"}})).lane == lane_of("", "pm_1")
    assert read(envelope(data={"object": {}})).lane == lane_of("", "evt_1")


def test_a_lane_is_the_same_on_every_machine_and_in_every_version() -> None:
    # Rows in the ledger carry it: with another formula, after an upgrade, two events of one customer would
    # run at once.
    assert lane_of("", "cus_1") == zlib.crc32(b"\0cus_1") & 0x7FFFFFFF == 167471928


# ── Whose it is ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("account", "context", "filed_under"),
    [
        (None, None, ""),
        ("acct_1", None, "acct_1"),
        ("acct_1", "acct_p/acct_1", "acct_1"),
        (None, "acct_1", "acct_1"),
        (None, "acct_p/acct_1", "acct_1"),
        (None, "org_1/acct_p/acct_1", "acct_1"),
        (None, "org_1", ""),
        (None, "acct_1/wksp_1", ""),
        ("", "", ""),
        (7, ["acct_1"], ""),
    ],
)
def test_an_event_is_filed_under_the_account_its_object_lives_in(account: Any, context: Any, filed_under: str) -> None:
    event = parse(event_json(account=account, context=context), received=0)
    assert event.account == filed_under
    # Its context stays what Stripe said, for that is how the object is asked for.
    assert event.context == (context if isinstance(context, str) else "")
    thin = {"id": "evt_1", "object": "v2.core.event", "type": "v1.x", "context": context, "account": account}
    assert parse(json.dumps(thin).encode(), received=0).account == filed_under


def test_ones_own_account_has_no_name_and_a_road_names_what_names_nothing() -> None:
    def account(said: str | None, *, own: str = "", otherwise: str = "") -> str:
        return filed(parse(event_json(account=said), received=0), own=own, otherwise=otherwise).account

    assert account(None) == "" and account("acct_1") == "acct_1"
    assert account("acct_own", own="acct_own") == "" and account("acct_1", own="acct_own") == "acct_1"
    assert account(None, otherwise="acct_2") == "acct_2" and account("acct_1", otherwise="acct_2") == "acct_1"
    assert account(None, own="acct_own", otherwise="acct_own") == ""
