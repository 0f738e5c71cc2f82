"""Which of two events of one second is the later one: decided when the events tell it, and never guessed.

Pure: `decide` is given events and says what they come to. What that makes of the tables is `test_order.py`.
"""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from kamiyo.projections import Row, row_before, row_of
from kamiyo.shapes import COLUMNS
from kamiyo.simulator import API_VERSIONS
from kamiyo.simulator.events import previous_attributes
from kamiyo.ties import Observation, decide
from tests.conftest import event_json, examples
from tests.turns import NOW, example, read

RECEIVED = datetime(2026, 9, 21, tzinfo=UTC)
CUSTOMER = example("customer", id="cus_1")

#: How a customer can look in these stories: two columns that are kept, one hash, one field that is not kept.
State = dict[str, Any]

states = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["Ada", "Bo"]),
        "balance": st.integers(0, 2),
        "tax_exempt": st.sampled_from(["none", "exempt"]),
        "metadata": st.dictionaries(st.sampled_from("kl"), st.sampled_from("12"), max_size=2),
    }
)


@st.composite
def walks(draw: st.DrawFn, *, returns: bool) -> list[State]:
    """The states of a customer through one second; without `returns` none that is kept comes twice."""
    chosen: list[State] = []
    for state in draw(st.lists(states, min_size=2, max_size=7)):
        known = [kept(other) for other in chosen]
        if returns or kept(state) not in known or kept(state) == known[-1]:
            chosen.append(state)
    return chosen


def change(event_id: str, before: State, after: State, version: str = API_VERSIONS[-1]) -> Observation:
    """An update, with its previous_attributes as Stripe makes them."""
    previous = previous_attributes(before, after)
    return observed(event_json(event_id, "customer.updated", CUSTOMER | after, previous=previous, created=NOW), version)


def first(event_id: str, state: State) -> Observation:
    return observed(event_json(event_id, "customer.created", CUSTOMER | state, created=NOW))


def observed(body: bytes, version: str = API_VERSIONS[-1]) -> Observation:
    event = read(json.dumps({**json.loads(body), "api_version": version}).encode())
    row = row_of(event, RECEIVED)
    assert row is not None
    return Observation(event, row, row_before(event, RECEIVED))


def changes(walk: Sequence[State], names: Sequence[str], versions: Sequence[str]) -> list[Observation]:
    steps = zip(walk, walk[1:], names, versions, strict=False)
    return [change(name, before, after, version) for before, after, name, version in steps if before != after]


def shown(row: Row) -> dict[str, Any]:
    found = dict(zip(COLUMNS[row.table], row.values, strict=True))
    return {"name": found["name"], "balance": found["balance"], "metadata": json.loads(found["metadata"])}


def kept(state: State) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name != "tax_exempt"}


# Ids in no order at all, as Stripe's are.
names = st.permutations([f"evt_{letter}" for letter in "abcdefg"])
versions = st.lists(st.sampled_from(API_VERSIONS), min_size=7, max_size=7)


@examples(300)
@given(walk=walks(returns=False), names=names, versions=versions, data=st.data())
def test_changes_that_lead_from_state_to_state_end_in_the_last_whatever_their_order(
    walk: list[State], names: list[str], versions: list[str], data: st.DataObject
) -> None:
    seen = changes(walk, names, versions)
    if seen:
        latest = decide(data.draw(st.permutations(seen)))
        assert latest.evidence == "decided"
        assert shown(latest) == kept(walk[-1])


@examples(300)
@given(walk=walks(returns=True), names=names, versions=versions, data=st.data())
def test_changes_and_changes_back_are_never_decided_wrongly(
    walk: list[State], names: list[str], versions: list[str], data: st.DataObject
) -> None:
    seen = changes(walk, names, versions)
    if not seen:
        return
    latest = decide(data.draw(st.permutations(seen)))
    if latest.evidence == "decided":
        assert shown(latest) == kept(walk[-1])
    else:
        # Round and round, and nothing says where it began: every state of the ring could be the last.
        assert kept(walk[0]) == kept(walk[-1])


@examples(300)
@given(walk=walks(returns=True), names=names, versions=versions, data=st.data())
def test_an_object_that_began_in_that_second_is_always_decided(
    walk: list[State], names: list[str], versions: list[str], data: st.DataObject
) -> None:
    seen = [*changes(walk, names, versions), first("evt_0", walk[0])]
    latest = decide(data.draw(st.permutations(seen)))
    assert latest.evidence == "decided"
    assert shown(latest) == kept(walk[-1])


@examples(200)
@given(walk=walks(returns=True), names=names, versions=versions, data=st.data())
def test_the_answer_is_the_same_in_every_order_down_to_the_event_that_gives_it(
    walk: list[State], names: list[str], versions: list[str], data: st.DataObject
) -> None:
    seen = changes(walk, names, versions)
    kept_back = data.draw(st.lists(st.booleans(), min_size=len(seen), max_size=len(seen)))
    seen = [one for one, back in zip(seen, kept_back, strict=True) if not back]
    if seen:
        assert decide(seen) == decide(data.draw(st.permutations(seen)))


@examples(100)
@given(walk=walks(returns=True), names=names, one=versions, other=versions)
def test_the_answer_does_not_depend_on_the_api_versions(
    walk: list[State], names: list[str], one: list[str], other: list[str]
) -> None:
    if seen := changes(walk, names, one):
        assert decide(seen) == decide(changes(walk, names, other))


# ── Told one by one ─────────────────────────────────────────────────────────────────────────────────────────

ADA = {"name": "Ada", "balance": 0, "tax_exempt": "none", "metadata": {}}
BO = ADA | {"name": "Bo"}
RICH_BO = BO | {"balance": 9}


def test_events_that_say_the_same_are_decided_and_the_smallest_id_stands_for_all() -> None:
    said = [
        observed(event_json(name, "customer.updated", CUSTOMER | BO, created=NOW))
        for name in ("evt_b", "evt_a", "evt_c")
    ]
    latest = decide(said)
    assert (latest.event_id, latest.evidence) == ("evt_a", "decided")


def test_of_two_changes_the_one_that_replaced_the_others_state_is_the_later() -> None:
    assert shown(decide([change("evt_z", ADA, BO), change("evt_a", BO, RICH_BO)])) == kept(RICH_BO)


def test_a_link_that_is_missing_is_bridged_by_what_the_later_event_replaced() -> None:
    # Between the two the phone changed as well, and that event is not here.
    called = BO | {"phone": "+1"}
    latest = decide([change("evt_z", ADA, BO), change("evt_a", called, called | {"balance": 3})])
    assert (shown(latest)["balance"], latest.evidence) == (3, "decided")


def test_two_changes_that_nothing_connects_are_undecided() -> None:
    other = RICH_BO | {"name": "Cy"}
    latest = decide([change("evt_a", ADA, BO), change("evt_b", other, other | {"balance": 8})])
    assert latest.evidence == "undecided"


def test_a_change_and_its_undoing_are_undecided_even_beside_a_change_that_nobody_keeps() -> None:
    exempt = ADA | {"tax_exempt": "exempt"}
    ring = [change("evt_a", ADA, BO), change("evt_b", BO, ADA), change("evt_c", ADA, exempt)]
    for version in API_VERSIONS:
        # One of them in another version: a field that is worded differently is no evidence.
        seen = [change("evt_a", ADA, BO, version), *ring[1:]]
        assert decide(seen).evidence == "undecided", version


def test_an_event_without_previous_attributes_says_only_what_the_trail_already_knows() -> None:
    loose = observed(event_json("evt_m", "customer.updated", CUSTOMER | BO, created=NOW))
    latest = decide([change("evt_z", ADA, BO), loose, change("evt_a", BO, RICH_BO)])
    assert (shown(latest), latest.evidence) == (kept(RICH_BO), "decided")


def test_an_event_that_hangs_in_the_air_leaves_the_second_undecided() -> None:
    loose = observed(event_json("evt_m", "customer.updated", CUSTOMER | RICH_BO, created=NOW))
    assert decide([change("evt_z", ADA, BO), loose]).evidence == "undecided"


def test_a_card_that_was_attached_changed_and_changed_back_in_one_second_is_decided() -> None:
    card = example("payment_method", id="pm_1", customer="cus_1", metadata={})
    marked = {**card, "metadata": {"k": "1"}}
    seen = [
        observed(event_json("evt_c", "payment_method.attached", card, created=NOW)),
        observed(
            event_json("evt_b", "payment_method.updated", marked, previous={"metadata": {"k": None}}, created=NOW)
        ),
        observed(event_json("evt_a", "payment_method.updated", card, previous={"metadata": {"k": "1"}}, created=NOW)),
    ]
    latest = decide(seen)
    assert (latest.event_id, latest.evidence) == ("evt_a", "decided")


def test_a_thousand_changes_of_one_second_are_decided_in_reasonable_time() -> None:
    walk = [ADA | {"balance": number} for number in range(1000)]
    seen = [change(f"evt_{at}", before, after) for at, (before, after) in enumerate(pairwise(walk))]
    assert shown(decide(seen))["balance"] == 999
    del seen[500]
    assert decide(seen).evidence == "undecided"
