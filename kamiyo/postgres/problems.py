"""What goes wrong with the embedded server, in a sentence that says what to do about it."""

import re
from pathlib import Path
from typing import Final

from kamiyo.errors import DatabaseUnavailable


class EmbeddedPostgresError(DatabaseUnavailable):
    """The embedded PostgreSQL cannot be started or stopped. The message says what happened, what to do, and
    where the server's log is."""


_ADVICE: Final = (
    (
        r"No space left on device|Disk quota exceeded",
        "The disk is full: make room and start again; nothing is lost.",
    ),
    (
        r"could not (?:create|map|resize) (?:any )?(?:anonymous )?shared memory|Cannot allocate memory",
        "There is too little memory, or too little of it may be shared.",
    ),
    (
        r"has invalid permissions|could not change permissions",
        "Only its owner may use it: chmod 700. Where the file system keeps no permissions (a Windows or "
        "network drive), choose a folder on another one with KAMIYO_DATA_DIR.",
    ),
    (
        r"Unix-domain socket|Unix address",
        "Its socket could not be made: the temporary folder (TMPDIR) has to be writable.",
    ),
    (
        r"Permission denied|Operation not permitted|wrong ownership|must be started by the user",
        "The user that runs it may not use that file: give the folder to that user, or choose another one "
        "with KAMIYO_DATA_DIR.",
    ),
    (
        r"needed by .*initdb.* but was not found",
        'Where the path has one of $ ` " \\ in it, initdb does not find its own programs: move the project '
        "to a folder without, or name a PostgreSQL of your own in DATABASE_URL.",
    ),
    (r"Read-only file system", "Choose a folder that can be written with KAMIYO_DATA_DIR."),
    (r"lock file .* already exists", "Another PostgreSQL runs on this data: stop that one."),
    (r"still in use", "Processes of an earlier server still run on this data: end them and start again."),
    (
        r"error while loading shared libraries|Exec format error|version `GLIBC",
        "Its binaries do not fit this system: name a PostgreSQL of your own in DATABASE_URL.",
    ),
    (
        r"invalid value for parameter|unrecognized configuration parameter",
        "One of the settings given is wrong.",
    ),
)
"""What PostgreSQL or the operating system say, and what to do about it; the first that fits."""


def explained(what: str, said: str, log: Path | None) -> str:
    """One paragraph: what happened, the server's own words for why, what to do, where its log is."""
    # `LOG` and `DETAIL` lines surround the one line that says why.
    why = re.findall(r"(?:PANIC|FATAL|[Ee]rror):\s+(.+)", said) or said.strip().splitlines()[-1:]
    advice = next((advice for pattern, advice in _ADVICE if re.search(pattern, said)), "")
    parts = [f"{what}: {why[0].strip().rstrip('.')}." if why else f"{what}.", advice]
    if log is not None and log.exists():
        parts.append(f"Its log: {log}")
    return " ".join(part for part in parts if part)
