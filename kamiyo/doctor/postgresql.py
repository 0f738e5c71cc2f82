"""The database: version, durability, clock, migrations, rights; and what it knows of the events."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg

from kamiyo import database
from kamiyo.database import DATABASE_ERRORS, Connection, Pool, load_queries
from kamiyo.doctor import processing
from kamiyo.doctor.finding import Finding, Subject, failed, passed, warning, words
from kamiyo.settings import Settings

_SQL = load_queries("doctor.sql")

#: The oldest PostgreSQL that has everything Kamiyo asks of it (idle_session_timeout is new in 14).
OLDEST_POSTGRES = 140000

CLOCK_SECONDS = 2.0


@asynccontextmanager
async def opened(subject: Subject) -> AsyncIterator[tuple[Connection | None, Pool | None, Finding]]:
    nothing = failed(
        "database",
        "DATABASE_URL is not set, and there is no embedded PostgreSQL yet",
        "Set DATABASE_URL to your PostgreSQL; for a trial, start once with `make run`.",
    )
    if subject.database_url is None:
        yield None, None, nothing
        return
    try:
        db = await asyncpg.connect(
            subject.database_url, timeout=5, server_settings={"application_name": "kamiyo doctor", "timezone": "UTC"}
        )
    except ValueError:
        # Its words can quote a piece of the password.
        mend = "Write postgresql://user:password@host:5432/name; percent-encode what is special in the password."
        yield None, None, failed("database", "DATABASE_URL cannot be read as an address", mend)
        return
    except DATABASE_ERRORS as error:
        yield (
            None,
            None,
            failed(
                "database",
                f"no connection: {words(error)}",
                "Check DATABASE_URL, that PostgreSQL runs, and that it lets this machine in.",
            ),
        )
        return
    pool = await database.open_pool(subject.database_url, size=2, application="kamiyo doctor", idle_limit=60)
    try:
        yield db, pool, nothing
    finally:
        await db.close()
        pool.terminate()


async def answers(db: Connection, subject: Subject) -> AsyncIterator[Finding]:
    server = await db.fetchrow(_SQL["server"])
    assert server is not None  # noqa: S101 - a SELECT without FROM has exactly one row
    yield database_server(server["version_number"], server["version"], read_only=server["read_only"])
    yield durability(fsync=server["fsync"], full_pages=server["full_page_writes"], commit=server["synchronous_commit"])
    yield wal(server["version_number"], server["wal_compression"])
    yield await _database_clock(db)
    missing = await database.missing_migrations(db)
    if missing:
        yield failed("migrations", f"the database lacks {', '.join(missing)}", "Run: kamiyo migrate")
        return
    yield passed("migrations", f"all {len(database.migration_files())} are there")
    yield await role(db, subject.settings)
    yield await processing.workers(db)
    for look in (processing.processed, processing.unread, processing.failures, processing.compared):
        try:
            yield await look(db, subject.settings)
        except asyncpg.InsufficientPrivilegeError as error:
            yield warning("events", f"could not be looked at: {words(error)}", "See the check of the role, above.")


def database_server(number: int, version: str, *, read_only: bool) -> Finding:
    """PostgreSQL's version (`number` as its server_version_num), and whether it takes writes."""
    if number < OLDEST_POSTGRES:
        return failed("database", f"PostgreSQL {version}", "Upgrade PostgreSQL to 14 or newer.")
    if read_only:
        return failed(
            "database",
            f"PostgreSQL {version} takes no writes: it is a standby, or default_transaction_read_only is on",
            "Let DATABASE_URL name the primary.",
        )
    return passed("database", f"PostgreSQL {version} answers, and takes writes")


def durability(*, fsync: bool, full_pages: bool, commit: str) -> Finding:
    """Whether what was answered 200 is on disk."""
    off = [
        name
        for name, on in (("fsync", fsync), ("full_page_writes", full_pages), ("synchronous_commit", commit != "off"))
        if not on
    ]
    if off:
        return failed(
            "durability",
            f"{' and '.join(off)} {'is' if len(off) == 1 else 'are'} off: an event that was answered 200 can be lost "
            "when the power fails",
            "; ".join(f"ALTER SYSTEM SET {name} = on" for name in off) + "; SELECT pg_reload_conf()",
        )
    return passed("durability", "fsync, full_page_writes and synchronous_commit are on")


def wal(number: int, compression: str) -> Finding:
    """What PostgreSQL (`number`: its server_version_num) does with whole pages in the WAL. See decision 0030."""
    if compression in ("on", "pglz"):
        return warning(
            "wal",
            "whole pages are compressed with pglz, which takes a third of what a full database can store",
            f"ALTER SYSTEM SET wal_compression = {'lz4' if number >= 150000 else 'off'}; SELECT pg_reload_conf()",
        )
    return passed("wal", "whole pages are not compressed" if compression == "off" else f"{compression} compresses them")


async def _database_clock(db: Connection) -> Finding:
    before = time.time()
    theirs = float(await db.fetchval(_SQL["clock"]))
    return clock("the database's", theirs - (before + time.time()) / 2, CLOCK_SECONDS)


def clock(whose: str, ahead: float, allowed: float) -> Finding:
    """How far another clock is ahead of ours, in seconds."""
    if abs(ahead) > allowed:
        return failed(
            "clock",
            f"{whose} clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} this machine's: retries come "
            "at the wrong time, and right signatures can be refused as too old or too new",
            "Let NTP keep the time on both machines: timedatectl set-ntp true",
        )
    return passed("clock", f"{whose} clock and this machine's agree to within {allowed:g} s")


async def role(db: Connection, settings: Settings) -> Finding:
    role, rights = await db.fetchrow(_SQL["role"]), await db.fetchrow(_SQL["rights"])
    assert role is not None and rights is not None  # noqa: S101 - the current role exists, an aggregate has one row
    page = "docs/deploy.md, “The database role”"
    if rights["lacking"]:
        return failed(
            "role",
            f"{role['name']} may not read and write {', '.join(rights['lacking'][:4])}"
            + (" and others" if len(rights["lacking"]) > 4 else ""),
            f"Grant them as {page}, shows.",
        )
    if settings.database_url is None:
        return passed("role", "the embedded PostgreSQL's own, reached through its socket alone")
    if role["superuser"]:
        return warning(
            "role", f"{role['name']} is a superuser of PostgreSQL", f"Give Kamiyo a role of its own: {page}."
        )
    if settings.auto_migrate and not rights["owner"]:
        return warning(
            "role",
            f"{role['name']} may not change the tables, and KAMIYO_AUTO_MIGRATE is on: a start after an upgrade fails",
            "Set KAMIYO_AUTO_MIGRATE=false, and run `kamiyo migrate` as the owner.",
        )
    return passed("role", f"{role['name']} may read and write all tables, and is no superuser")
