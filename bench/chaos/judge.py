"""The verdict, in SQL: what was promised, what Stripe says, and what the tables say."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.chaos.operators import Ran
from bench.chaos.stripe import Stripe
from bench.chaos.stripe_api import Call
from bench.chaos.traffic import Traffic
from kamiyo.database import Connection

_HERE = Path(__file__).parent

_COUNTS = """
SELECT (SELECT count(*) FROM chaos.sent WHERE thin AND answered > 0) AS thin,
       (SELECT count(*) FROM chaos.sent WHERE thin AND twin AND answered > 0) AS twins,
       (SELECT count(*) FROM chaos.calls WHERE status IN (200, 404)) AS reads,
       (SELECT count(*) FROM chaos.calls WHERE status NOT IN (200, 404)) AS refused,
       (SELECT count(DISTINCT (place, object_id)) FROM chaos.ties) AS ties,
       (SELECT count(*) FROM chaos.commands) AS commands,
       (SELECT coalesce(sum(times), 0)::bigint FROM chaos.again) AS again,
       (SELECT count(*) FROM chaos.cleaned) AS cleaned
"""

#: The counts of the last line that must be 0, in its order.
FAULTS = ("lost", "doubled", "backwards", "overlapped", "stuck")


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault: the question of judge.sql that found it, what it is about, and why."""

    question: str
    what: str
    why: str

    @property
    def fault(self) -> str:
        """Which count of the last line it belongs to."""
        return self.question.partition("_")[0]


@dataclass(frozen=True, slots=True)
class Asked:
    """What Stripe's API was asked.

    `rate` is how much the budget allows in a second. `spare`: so many requests more may come late and together, from
    processes that were stopped between taking leave to ask and asking.
    """

    calls: Sequence[Call]
    rate: int
    spare: int


@dataclass(frozen=True)
class Verdict:
    """What the run came to. `events` are those acknowledged, `duplicates` acknowledged copies beyond the first.

    `counts` are those of what had to do with Stripe's API and with operators, by their names.
    """

    events: int
    kills: int
    duplicates: int
    findings: tuple[Finding, ...]
    counts: dict[str, int]

    def count(self, fault: str) -> int:
        """How many faults of this kind."""
        return sum(finding.fault == fault for finding in self.findings)

    @property
    def last_line(self) -> str:
        """The run in one line."""
        faults = " ".join(f"{fault}={self.count(fault)}" for fault in FAULTS)
        return f"events={self.events} kills={self.kills} duplicates={self.duplicates} {faults}"

    @property
    def line_before(self) -> str:
        """Thin events, those among them with a twin, what was read and what Stripe refused, and ties that were read;
        what operators ran, how often they put an event back in line, and how many they cleaned up."""
        return " ".join(f"{name}={count}" for name, count in self.counts.items())


async def prepare(db: Connection) -> None:
    """Make the tables and triggers of the harness, in a database with Kamiyo's."""
    await db.execute((_HERE / "tables.sql").read_text(encoding="utf-8"))


async def bear_witness(db: Connection, traffic: Traffic, stripe: Stripe, asked: Asked, ran: Sequence[Ran] = ()) -> None:
    """Write down what was sent and promised, what Stripe was asked, what it says, and what operators ran."""
    await db.copy_records_to_table(
        "commands", schema_name="chaos", records=((one.words, one.ending, one.wrong) for one in ran)
    )
    await db.execute("INSERT INTO chaos.budget VALUES ($1, $2)", float(asked.rate), float(asked.spare))
    await db.copy_records_to_table(
        "calls", schema_name="chaos", records=((call.at, call.status, call.path) for call in asked.calls)
    )
    await db.copy_records_to_table("unseen", schema_name="chaos", records=sorted(traffic.unseen))
    await db.copy_records_to_table(
        "sent",
        schema_name="chaos",
        records=(
            (
                *(letter.event_id, letter.event_type, letter.owner),
                hashlib.md5(letter.body, usedforsecurity=False).hexdigest(),
                *(letter.handled, letter.fate.value),
                letter.fate.tries if letter.fate.is_poison else None,
                *(stripe.answered[number], stripe.last_status.get(number, "never sent")),
                *(letter.thin, letter.twin, letter.occurrence),
            )
            for number, letter in enumerate(traffic.letters)
        ),
    )
    for table, rows in traffic.truth.items():
        columns = await db.fetch(
            "SELECT column_name::text, data_type::text FROM information_schema.columns "
            "WHERE table_schema = 'chaos' AND table_name = $1 ORDER BY ordinal_position",
            table,
        )
        await db.set_type_codec("jsonb", schema="pg_catalog", encoder=_json, decoder=str, format="text")
        await db.executemany(
            f"INSERT INTO chaos.{table} ({', '.join(name for name, _ in columns)}) "  # noqa: S608 - names of our own
            f"VALUES ({', '.join(f'${place}' for place in range(1, len(columns) + 1))})",
            [[_value(row[name], kind) for name, kind in columns] for row in rows.values()],
        )


def _json(value: object) -> str:
    return json.dumps(value)


def _value(value: Any, kind: str) -> Any:
    if kind == "timestamp with time zone" and value is not None:
        return datetime.fromtimestamp(value, UTC)
    return value


async def judge(db: Connection, *, events: int, kills: int, duplicates: int) -> Verdict:
    """Ask every question of judge.sql."""
    findings: list[Finding] = []
    for name, question in questions().items():
        findings += [Finding(name, what, why) for what, why in await db.fetch(question)]
    counts = dict(await db.fetchrow(_COUNTS) or {})
    return Verdict(events, kills, duplicates, tuple(findings), counts)


def questions() -> dict[str, str]:
    """Every question of judge.sql by its name."""
    text = (_HERE / "judge.sql").read_text(encoding="utf-8")
    _, *parts = re.split(r"^-- name: (\w+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))
