"""The dashboard's words and pictures, each by itself."""

from datetime import UTC, datetime, timedelta

import pytest

from kamiyo.web import charts
from kamiyo.web.dashboard import pages, queries, wording
from kamiyo.web.dashboard.queries import Group


def test_amounts_are_in_the_currencys_own_units() -> None:
    thin = "\N{NARROW NO-BREAK SPACE}"
    assert wording.money(104900, "eur") == f"1{thin}049.00{thin}EUR"
    assert wording.money(-5, "usd") == f"−0.05{thin}USD"
    assert wording.money(500, "jpy") == f"500{thin}JPY"
    assert wording.money(1234, "kwd") == f"1.234{thin}KWD"
    assert wording.money(7, None) == "7"
    assert wording.money(None, "eur") == "–"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        *(
            (0.2, "now"),
            (12, "12 s ago"),
            (-40, "in 40 s"),
            (150, "2 min ago"),
            (5399, "90 min ago"),
            (5400, "2 h ago"),
        ),
        *((35 * 3600, "35 h ago"), (36 * 3600, "2 d ago"), (-86400 * 30, "in 30 d")),
    ],
)
def test_how_long_ago_is_said_in_the_largest_unit_that_fits(seconds: float, said: str) -> None:
    now = datetime(2026, 11, 23, 3, 0, tzinfo=UTC)
    assert wording.relative(now - timedelta(seconds=seconds), now) == said


def test_a_moment_carries_its_exact_time_in_utc() -> None:
    moment = datetime.fromisoformat("2026-11-23T04:05:06.789012+02:00")
    text = wording.when(moment, moment + timedelta(seconds=5))
    assert text == (
        '<time datetime="2026-11-23T02:05:06.789012+00:00" title="2026-11-23 02:05:06.789 UTC" data-rel>5 s ago</time>'
    )


@pytest.mark.parametrize(
    ("highest", "end"), [(0, 1), (1, 1), (3, 5), (10, 10), (11, 20), (21, 25), (26, 50), (51, 100), (0.03, 0.05)]
)
def test_an_axis_ends_at_a_round_number_that_holds_everything(highest: float, end: float) -> None:
    assert charts.ceiling(highest) == pytest.approx(end)


def test_columns_stand_on_one_another_and_a_line_breaks_where_nothing_is_known() -> None:
    stack = [charts.Series("good", [6, 0]), charts.Series("bad", [4, 1])]
    drawn = charts.columns(stack, 10, ["a", "<b>"], "what & when")
    assert '<rect class="good" x="1" y="40.00" width="8" height="60.00"/>' in drawn
    assert '<rect class="bad" x="1" y="0.00" width="8" height="40.00"/>' in drawn
    assert "<title>&lt;b&gt;</title>" in drawn and 'aria-label="what &amp; when"' in drawn
    line = charts.line(charts.Series("info", [1, 2, None, 2, None]), 2, list("abcde"), "x")
    assert line.count('class="line info"') == 2
    assert 'd="M5 50.00L15 0.00"' in line and 'd="M31 0.00L39 0.00"' in line


@pytest.mark.parametrize(
    ("traceback", "place"),
    [
        (
            '  File "/srv/a/billing.py", line 4, in grant\n  File "C:\\b\\mail.py", line 41, in <lambda>\nX',
            "mail.py:41 in <lambda>",
        ),
        ("", None),
        ("no frames here", None),
    ],
)
def test_the_place_of_an_error_is_its_last_frame(traceback: str, place: str | None) -> None:
    assert queries.place_of(traceback) == place
    moment = datetime.now(UTC)
    group = Group("abc", "shop.errors.Oops", "", traceback, "evt_1", moment, moment)
    assert (group.module, group.name, group.where) == ("shop.errors.", "Oops", place)


def test_a_position_survives_its_way_through_an_address_to_the_microsecond() -> None:
    at = datetime(2026, 11, 23, 1, 2, 3, 456789, tzinfo=UTC)
    assert pages._position(pages._cursor((at, 7))) == (at, 7)
    for nonsense in (None, "", "x", "A" * 400, "é", "====", "!!!!"):
        assert pages._position(nonsense) is None
